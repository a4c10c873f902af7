"""How much of a stranger's file is read: each bound has a name, and can be raised.

A file may not keep this machine busy or fill its memory, so everything that a few bytes could make large is bounded while
it is read. No honest model comes near these bounds; one that does names the bound, which the environment raises, for one
command or for good:

    NORMFUSE_LIMIT_NESTING=500 normfuse inspect model.pt
"""

from __future__ import annotations

import os

MIB = 1 << 20


class OverLimit(Exception):
    """The file asks for more than a bound allows; ``limit`` is the bound's name."""

    def __init__(self, what: str, limit: str) -> None:
        super().__init__(f"{what}; the limit {limit} is {globals()[limit]:,}")
        self.limit = limit

    @property
    def setting(self) -> str:
        """What raises the bound."""
        return f"NORMFUSE_LIMIT_{self.limit}=…"

    @property
    def hint(self) -> str:
        """What to do about a file."""
        return f"if you know where the file is from, raise the limit: {self.setting}"


def _limit(name: str, default: int) -> int:
    given = os.environ.get(f"NORMFUSE_LIMIT_{name}", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 19 else default


PICKLE_BYTES = _limit("PICKLE_BYTES", 256 * MIB)
"""Bytes of one pickle, without the tensors beside it."""

PROGRAM_BYTES = _limit("PROGRAM_BYTES", 1024 * MIB)
"""Bytes of one JSON text in a .pt2."""

PLAN_BYTES = _limit("PLAN_BYTES", 256 * MIB)
"""Bytes of a plan, a lock file or a calibration."""

HEADER_BYTES = _limit("HEADER_BYTES", 100 * MIB)
"""Bytes of the header of a safetensors file, which are those that the library reads."""

FORMULA_ENTRIES = _limit("FORMULA_ENTRIES", 1 << 28)
"""Entries of any value in a plan's formulas and expressions, beyond sixteen times those of the model's largest value."""

NESTING = _limit("NESTING", 200)
"""How deep containers, modules and their states may lie in each other."""

OCCURRENCES = _limit("OCCURRENCES", 1_000_000)
"""Values in a file, each counted as often as it is reached: a list that holds one list twice holds its values twice."""

MODULES = _limit("MODULES", 2_000)
"""Modules of a model, each counted as often as it is reached, beyond four times those that the file stores."""

MODEL_ENTRIES = _limit("MODEL_ENTRIES", 1 << 28)
"""Entries of a model that a configuration describes, beyond eight times those of the weights beside it."""

INFLATION = _limit("INFLATION", 32)
"""How many times its own size an archive may become when it is unpacked (beyond 64 MiB, which are always allowed)."""

VIEW_BYTES = _limit("VIEW_BYTES", 1024 * MIB)
"""Bytes of a tensor that shows the same stored values many times (expanded, stride 0), if it were written out."""

WAITING_BYTES = _limit("WAITING_BYTES", 256 * MIB)
"""Bytes of tensors that wait to be written while the next one is computed; a larger one is written before."""

CHANGED_BYTES = _limit("CHANGED_BYTES", 1024 * MIB)
"""Bytes of changed tensors that a proof holds; of more, each is computed again in each run that reads it."""

VALUE_BYTES = _limit("VALUE_BYTES", 16384 * MIB)
"""Bytes of any one value that a model computes on its example inputs."""

INPUT_BYTES = _limit("INPUT_BYTES", 8192 * MIB)
"""Bytes of all example inputs together, drawn or read."""

EXPRESSION_CHARS = _limit("EXPRESSION_CHARS", 10_000)
"""Characters of one size or guard in a .pt2."""

EXPRESSION_DEPTH = _limit("EXPRESSION_DEPTH", 150)
"""How deep one size or guard may be nested."""

EXPRESSION_BITS = _limit("EXPRESSION_BITS", 1024)
"""Bits of the largest number that a size or guard could come to, when each symbol in it has 32."""


SECONDS = _limit("SECONDS", 86_400)
"""Seconds that one command of the command line may take (0: any). Where strangers' files are read, set what you can wait."""


def check_inflation(unpacked: int, size: int) -> None:
    """Refuse an archive of `size` bytes that becomes much larger when it is unpacked.

    Raises:
        OverLimit: it does.
    """
    if unpacked > INFLATION * size + 64 * MIB:
        raise OverLimit(f"an archive of {size:,} bytes that unpacks to {unpacked:,}", "INFLATION")
