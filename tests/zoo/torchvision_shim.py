"""Let torchvision import beside a torch that its compiled operators were not built for.

The registry's torchvision is a CUDA build. Beside a CPU torch its Python parts work and its C++ operators do not load,
and the import stops at the first fake kernel for one of them: "operator torchvision::nms does not exist". timm, and
transformers' model classes once torchvision is installed, stop with it. Nothing here or in the benchmarks calls such an
operator, so their fake kernels are left out, and only theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def install() -> None:
    """From here on a fake kernel for a torchvision operator that does not exist is ignored. Imports nothing."""
    original = torch.library.register_fake
    if getattr(original, "ignores_missing_torchvision", False):
        return

    @functools.wraps(original)
    def register_fake(op: Any, func: Any = None, /, **options: Any) -> Any:
        options["_stacklevel"] = options.get("_stacklevel", 1) + 1  # the frame of this function
        if not (isinstance(op, str) and op.startswith("torchvision::")):
            return original(op, func, **options)

        def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
            try:
                original(op, kernel, **options)
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
            return kernel

        return register if func is None else register(func)

    register_fake.ignores_missing_torchvision = True  # type: ignore[attr-defined]
    torch.library.register_fake = register_fake  # type: ignore[assignment]
