"""Calls of products with weights."""

from __future__ import annotations

from typing import Any

from normfuse.graph.views import aten
from tests.graph.ops.calls import Draw, case


@case(aten.linear.default)
def _linear(d: Draw, op: Any) -> Any:
    inner, outer = (4, 4) if d.flag() else (d.of((1, 2, 3)), d.of((1, 2, 4)))
    x = d.normal(*(4 if d.flag() else 2 for _ in range(d.of(range(4)))), inner)
    weight = d.normal(inner) if d.of(range(8)) == 0 else d.normal(outer, inner)
    if weight.dim() == 1:
        return {"input": x, "weight": weight}
    bias = d.of(("none", "plain", "plain", "one", "scalar", "table", "thin table"))
    rows = x.shape[0] if x.dim() == 2 else 1
    shapes = {"plain": (outer,), "one": (1,), "scalar": (), "table": (rows, outer), "thin table": (rows, 1)}
    if bias in ("table", "thin table") and x.dim() != 2:
        bias = "plain"
    named = {"input": x, "weight": weight}
    return named if bias == "none" else {**named, "bias": d.normal(*shapes[bias])}


@case(aten.addmm.default)
def _addmm(d: Draw, op: Any) -> Any:
    n, m, p = (3, 3, 3) if d.flag() else (d.of((1, 2)), d.of((1, 4)), d.of((1, 3)))
    scale = {"alpha": 2.0, "beta": -0.5} if d.flag() else {}
    return {"self": d.partner((n, p)), "mat1": d.normal(n, m), "mat2": d.normal(m, p), **scale}


@case(aten.baddbmm.default)
def _baddbmm(d: Draw, op: Any) -> Any:
    b, n, m, p = (3, 3, 3, 3) if d.flag() else (d.of((1, 2)), d.of((1, 2)), d.of((1, 4)), d.of((1, 3)))
    scale = {"alpha": 2.0, "beta": -0.5} if d.flag() else {}
    return {"self": d.partner((b, n, p)), "batch1": d.normal(b, n, m), "batch2": d.normal(b, m, p), **scale}


@case(aten.einsum.default)
def _einsum(d: Draw, op: Any) -> Any:
    """Factors of few letters, so that they share some; upper case sorts before lower case."""
    sizes = dict.fromkeys("aBcd", 3) if d.flag() else {letter: d.of((1, 2, 3)) for letter in "aBcd"}
    broadcast = [sizes["a"] if d.flag() else 2, 2]
    dotted = d.of(range(3)) == 0
    terms, tensors = [], []
    for _ in range(d.of((1, 2, 2, 3))):
        letters = [d.of("aBcd") for _ in range(d.of(range(1, 4)))]
        dots, place = dotted and d.flag(), d.of(range(len(letters) + 1))
        own = broadcast[d.of(range(3)) :] if dots else []
        terms.append("".join([*letters[:place], *["..."] * dots, *letters[place:]]))
        tensors.append(d.normal(*(sizes[each] for each in letters[:place]), *own, *(sizes[each] for each in letters[place:])))
    out = d.shuffled(d.some(sorted({each for term in terms for each in term if each != "."})))
    if "..." in "".join(terms) and d.of(range(4)):
        out.insert(d.of(range(len(out) + 1)), "...")
    arrow = d.of(("", " -> ", "->", "->"))
    return {"equation": d.of((",", ", ")).join(terms) + (arrow and arrow + "".join(out)), "tensors": tensors}


@case(aten.scaled_dot_product_attention.default)
def _attention(d: Draw, op: Any) -> Any:
    square = d.flag()
    queries, keys, inner, outer = (3, 3, 3, 3) if square else (d.of((1, 2)), d.of((1, 4)), d.of((1, 3)), d.of((2, 3)))
    heads = d.of(((), (1,), (2, 2), (3, 3)))
    grouped = len(heads) == 2 and d.flag()
    batch = (*heads[:-1], 1) if grouped else heads
    mask: dict[str, Any] = {"attn_mask": d.normal(queries, keys)} if d.flag() else {"is_causal": d.flag()}
    if d.of(range(4)) == 0:
        mask = {"attn_mask": d.mask(queries, 1).expand(queries, keys)}  # some queries may be kept from every key
    key, value = d.normal(*batch, keys, inner), d.normal(*batch, keys, outer)
    return {"query": d.normal(*heads, queries, inner), "key": key, "value": value, "enable_gqa": grouped, **mask}


@case(aten.mm.default, aten.bmm.default, aten.matmul.default)
def _matmul(d: Draw, op: Any) -> Any:
    n, m, p = (3, 3, 3) if d.flag() else (d.of((1, 2)), d.of((1, 4)), d.of((1, 3)))
    if op is aten.mm.default:
        return {"self": d.normal(n, m), "mat2": d.normal(m, p)}
    batch = d.of((1, 3))
    if op is aten.bmm.default:
        return {"self": d.normal(batch, n, m), "mat2": d.normal(batch, m, p)}
    left, right = (d.of(((), (1,), (3,), (3, 3), (1, 3))) for _ in range(2))
    a = d.normal(m) if d.of(range(6)) == 0 else d.normal(*left, n, m)
    b = d.normal(m) if d.of(range(6)) == 0 else d.normal(*right, m, p)
    return {"self": a, "other": b}


def _conv_named(d: Draw, dims: int, transposed: bool, batched: bool | None = None) -> dict[str, Any]:
    groups = d.of((1, 1, 2))
    inner, outer = (4, 4) if d.flag() else (groups * d.of((1, 2)), groups * d.of((1, 2)))
    batch = [] if (d.of(range(4)) == 0 if batched is None else not batched) else [d.of((1, 2, 4))]
    x = d.normal(*batch, inner, *(4 for _ in range(dims)))
    kernel = [d.of((1, 2)) for _ in range(dims)]
    weight = d.normal(inner, outer // groups, *kernel) if transposed else d.normal(outer, inner // groups, *kernel)
    named: dict[str, Any] = {"weight": weight, "groups": groups}
    if d.flag():
        named["bias"] = d.normal(outer)
    return {"input": x, **named}


@case(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
      aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)  # fmt: skip
def _conv(d: Draw, op: Any) -> Any:
    named = _conv_named(d, int(str(op)[len("aten.conv")]), transposed=False)
    if op._overloadname == "padding":
        return {**named, "padding": d.of(("same", "valid"))}
    return {**named, "padding": [d.of((0, 1))]} if d.flag() else named


@case(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(d: Draw, op: Any) -> Any:
    return _conv_named(d, int(str(op)[len("aten.conv_transpose")]), transposed=True)


@case(aten.convolution.default)
def _convolution(d: Draw, op: Any) -> Any:
    dims, transposed = d.of((1, 2)), d.flag()
    named = _conv_named(d, dims, transposed, batched=True)
    same = {"stride": [1] * dims, "padding": [0] * dims, "dilation": [1] * dims, "output_padding": [0] * dims}
    return {"bias": None, **named, **same, "transposed": transposed}


@case(aten.embedding.default)
def _embedding(d: Draw, op: Any) -> Any:
    rows, width = (3, 3) if d.flag() else (d.of((1, 4)), d.of((1, 2)))
    return {"weight": d.normal(rows, width), "indices": d.below(rows, *d.shape(0, 2))}


@case(aten.addr.default)
def _addr(d: Draw, op: Any) -> Any:
    rows, columns = (3, 3) if d.flag() else (d.of((2, 3)), d.of((1, 4)))
    scales = {"beta": d.of((1, 2)), "alpha": d.of((1, -0.5))}
    return {"self": d.partner((rows, columns)), "vec1": d.normal(rows), "vec2": d.normal(columns), **scales}


@case(aten.mv.default)
def _mv(d: Draw, op: Any) -> Any:
    rows, columns = (3, 3) if d.flag() else (d.of((2, 3)), d.of((1, 4)))
    return {"self": d.normal(rows, columns), "vec": d.normal(columns)}


@case(aten.conv_tbc.default)
def _conv_tbc(d: Draw, op: Any) -> Any:
    time, batch, inner, outer = (3, 3, 3, 3) if d.flag() else (d.of((2, 3)), d.of((1, 2)), d.of((1, 2)), d.of((1, 2, 4)))
    kernel = d.of((1, 2))
    named = {"self": d.normal(time, batch, inner), "weight": d.normal(kernel, inner, outer), "bias": d.normal(outer)}
    return {**named, "pad": d.of((0, 1))}


@case(aten.bilinear.default)
def _bilinear(d: Draw, op: Any) -> Any:
    one, other, outer = (3, 3, 3) if d.flag() else (d.of((1, 2)), d.of((2, 3)), d.of((1, 4)))
    batch = [3] * d.of((1, 2))
    bias = {"bias": d.normal(outer)} if d.flag() else {}
    return {"input1": d.normal(*batch, one), "input2": d.normal(*batch, other), "weight": d.normal(outer, one, other), **bias}
