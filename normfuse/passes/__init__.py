"""The passes: one file each; the folder is the registry."""
