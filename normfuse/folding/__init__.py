"""Affine maps along an axis, y = a⊙x + c: into the layers that write a value, into those that read it, or left as they are."""
