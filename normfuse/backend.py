"""The backend that `torch.compile(backend="normfuse")` finds; it is at home in `normfuse.torch_compile`."""

from normfuse.torch_compile.backend import Options, normfuse

__all__ = ["Options", "normfuse"]
