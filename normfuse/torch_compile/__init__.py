"""`torch.compile(backend="normfuse")`."""
