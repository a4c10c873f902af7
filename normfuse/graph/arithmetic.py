"""Which of torch's operators only compute: what a formula, a plan or a constant may be made of.

A plan is data that may come from anywhere, and so is a traced model. An operator computes if its results follow from its
operands alone: it writes to none of them, draws no random numbers, reads no memory that nobody filled, and reaches neither
files nor the terminal. Kernels that are torch's inner business (names with an underscore, other libraries' layouts) count only
where they are named here, because they trust their callers more than a stranger deserves.
"""

from __future__ import annotations

import re
from functools import cache

import torch

_INNER = frozenset(
    (
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "_conj",
        "_convolution",
        "_fft_c2c",
        "_fft_c2r",
        "_fft_r2c",
        "_log_softmax",
        "_native_batch_norm_legit_no_training",
        "_neg_view",
        "_reshape_alias",
        "_reshape_copy",
        "_safe_softmax",
        "_softmax",
        "_stack",
        "_to_copy",
        "_unsafe_index",
        "_unsafe_view",
        "_upsample_bicubic2d_aa",
        "_upsample_bilinear2d_aa",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "_weight_norm",
        "_weight_norm_interface",
    )
)
_NOT_ARITHMETIC = re.compile(
    r"as_strided.*|(new_)?empty.*|.*(file|save|load)|.*backward|(cudnn|miopen|mkldnn|mkl|fbgemm|sparse|nested|q|ccol|crow|record|rename"
    r"|refine|sym|to_sparse|to_mkldnn|to_padded|quantize|quantized|segment|retain|data|set|resize|is)(_.*)?|(lstm|gru|rnn)(_.*)?"
    r"|coalesce|values|indices|hspmm|warn|names|dropout.*|pin_memory|choose_qparams.*|unsafe_chunk"
)

_UPDATES_STATISTICS = frozenset(("batch_norm", "native_batch_norm", "instance_norm"))
"""In training these write to operands of theirs, whatever their schemas say."""


@cache
def only_computes(operator: object) -> bool:
    """Whether an operator is arithmetic on tensors and nothing else."""
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace != "aten":
        return False
    schema, name = operator._schema, operator._schema.name.removeprefix("aten::")
    takes = {str(argument.type) for argument in schema.arguments}
    gives = {str(result.type) for result in schema.returns}
    return (
        (not name.startswith("_") or name in _INNER)
        and not _NOT_ARITHMETIC.fullmatch(name)
        and name not in _UPDATES_STATISTICS
        and not schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in operator.tags
        and not any(word in each for each in takes for word in ("Generator", "Storage", "Stream", "__torch__"))
        and bool(gives)
        and gives <= {"Tensor", "List[Tensor]"}
    )


@cache
def operator_named(name: str, *, in_graph: bool = False) -> torch._ops.OpOverload:
    """The aten operator of a name such as ``rsqrt.default``: one that only computes.

    Args:
        name: its name and overload.
        in_graph: for a call in a program, where a norm has its statistics.

    Raises:
        ValueError: there is no such operator, or it does more than compute.
    """
    packet, _, overload = name.partition(".")
    found = None
    if packet.isidentifier() and overload.isidentifier() and not name.startswith("__"):
        found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    known = only_computes(found) or (in_graph and packet in _UPDATES_STATISTICS)
    if not isinstance(found, torch._ops.OpOverload) or not known:
        raise ValueError(f"aten has no operator '{name}' that only computes")
    return found
