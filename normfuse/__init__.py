"""normfuse: rewrite the normalization layers of trained PyTorch models, exactly, and prove it."""
