"""What a row says in its other columns, tried in float64: one function per column, each of which counts what it had to try."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from numpy.polynomial import chebyshev
from torch import Tensor
from torch.fx import Node

from normfuse.graph.interpreter import call
from normfuse.graph.ops.lookup import carries, computes, keeps, layer, passes_shift, product, rank, row, weighed
from normfuse.graph.ops.norms import operator_norm
from normfuse.graph.ops.row import ALGEBRAIC, ENTRYWISE, ROOTS, STATISTICS, Computes, Keeps, Normalization, Product
from normfuse.graph.ops.sizes import follows, meets_full_width, says_size, with_size
from normfuse.graph.views import NormKind, arguments
from tests.graph.ops.calls import Built
from tests.graph.ops.properties import agree, applied, flat, maps

Values = dict[Node, Any]


def _run(built: Built, changed: Values | None = None) -> Any:
    return call(built.node, {**built.values, **(changed or {})}, wide=True)


def _random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _plus(value: Any, axis: int, shift: Tensor) -> Any:
    """A value, or the floats among several, with a shift along an axis."""
    if isinstance(value, (list, tuple)):
        return [_plus(each, axis, shift) for each in value]
    if not value.is_floating_point() or value.shape[axis] != len(shift):
        return value
    return value + shift.view(-1, *(1 for _ in range(value.dim() - 1 - axis)))


def shift(built: Built) -> int:
    """A constant along an axis that is added to all carried operands is added to the result."""
    node, said = built.node, 0
    for axis in range(rank(node)) if passes_shift(node) else ():
        carried = dict(carries(node, axis) or ())
        result = _run(built)
        entries = _random(flat(result)[0].shape[axis])
        shifted = _run(built, {operand: _plus(built.values[operand], own, entries) for operand, own in carried.items()})
        if carried:
            said += 1
            assert agree(shifted, _plus(result, axis, entries)), f"a shift along {axis} does not pass"
    return said


def _first(node: Node) -> Node:
    operand = node.args[0] if not isinstance(node.target, torch._ops.OpOverload) else next(iter(arguments(node).values()))
    assert isinstance(operand, Node)
    return operand


def kept(built: Built) -> int:
    """The entries of the first operand, as it is said that they are kept."""
    node, how = built.node, keeps(built.node)
    if how is None:
        return 0
    given, result = flat(built.values[_first(node)]), flat(_run(built))
    if how is Keeps.COPY or how is Keeps.CAST:
        assert [x.shape for x in result] == [x.shape for x in given]
        assert torch.equal(result[0], given[0].to(result[0].dtype))
    elif how is Keeps.RESHAPE:
        assert torch.equal(result[0].flatten(), given[0].flatten())
    elif how is Keeps.PERMUTE:
        order = [own for axis in range(rank(node)) for _, own in carries(node, axis) or ()]
        assert torch.equal(result[0], given[0].permute(order))
    else:
        before, after = ({each for x in values for each in x.flatten().tolist()} for values in (given, result))
        assert after <= before
        assert how in (Keeps.PICK, Keeps.LOOKUP) or after == before
        assert how is not Keeps.EXPAND or torch.equal(result[0], given[0].expand_as(result[0]))
    return 1


def computed(built: Built) -> int:
    """What is computed is what is said to be computed."""
    node, what = built.node, computes(built.node)
    if what is None:
        return 0
    result = _run(built)
    if what in ENTRYWISE:
        _is_entrywise(built, result)
    if what in ALGEBRAIC:
        _is_analytic(built)
    if what in ROOTS:
        _is_root(built)
    if what in STATISTICS:
        _ignores_order(built, result)
    a = {name: built.values.get(each, each) if isinstance(each, Node) else each for name, each in arguments(node).items()}
    if what in _ARITHMETIC:
        assert agree(result, _ARITHMETIC[what](a["self"], a["other"] * a.get("alpha", 1)))
    if what is Computes.CHOICE:
        options = (a["self"], a["value"] if "value" in a else a["other"])
        assert bool(torch.stack([result == option for option in options]).any(0).all())
    if what is Computes.SOFTMAX:
        assert bool((result > 0).all())
        assert agree(result.sum(a["dim"]), torch.ones_like(result.sum(a["dim"])))
    if what is Computes.FILL:
        assert result.unique().numel() <= 1
    return 1


_ARITHMETIC: dict[Computes, Callable[[Any, Any], Any]] = {
    Computes.SUM: lambda x, y: x + y,
    Computes.DIFFERENCE: lambda x, y: x - y,
    Computes.PRODUCT: lambda x, y: x * y,
    Computes.QUOTIENT: lambda x, y: x / y,
}


def _tensors(built: Built) -> list[Node]:
    return [each for each in dict.fromkeys(built.node.all_input_nodes) if isinstance(built.values[each], Tensor)]


def _is_entrywise(built: Built, result: Tensor) -> None:
    """All operands in one row, in another order: the result likewise."""
    order = torch.randperm(result.numel(), generator=torch.Generator().manual_seed(0))
    rows = {each: built.values[each].expand_as(result).flatten()[order] for each in _tensors(built)}
    assert agree(_run(built, rows), result.flatten()[order])


def _along_a_line(built: Built, points: Tensor) -> Tensor:
    """Results where all floats lie on lines between positive numbers, as rows."""
    floats = [each for each in _tensors(built) if built.values[each].is_floating_point()]
    results = []
    for point in points.tolist():
        changed = {}
        for seed, each in enumerate(floats):
            ends = (0.6 + _random(*built.values[each].shape, seed=2 * seed + end).sigmoid() for end in (0, 1))
            start, stop = ends
            changed[each] = start + (stop - start) * (point + 1) / 2
        result = _run(built, changed)
        results.append(torch.cat([x.double().flatten() for x in flat(result)]))
    return torch.stack(results)


def _is_analytic(built: Built) -> None:
    """An analytic function is a polynomial of some thirty degrees on a line; what has a bend or a jump is not."""
    nodes = torch.from_numpy(chebyshev.chebpts1(30))
    between = torch.tensor([-0.71, -0.11, 0.37, 0.83], dtype=torch.float64)
    fit = chebyshev.chebfit(nodes.numpy(), _along_a_line(built, nodes).numpy(), 29)
    guessed = torch.from_numpy(chebyshev.chebval(between.numpy(), fit).T)
    assert torch.allclose(guessed.reshape(4, -1), _along_a_line(built, between), rtol=1e-6, atol=1e-6), "it is not analytic"


def _is_root(built: Built) -> None:
    """The square of the result, or of its reciprocal, is a polynomial of at most the second degree along any line."""
    points = torch.tensor([-1.0, -0.2, 0.5, 1.0], dtype=torch.float64)
    squares = _along_a_line(built, points) ** 2
    squares = squares[:, torch.isfinite(squares).all(0)]  # of one entry there may be no deviation
    assert not squares.numel() or any(map(_fits, (squares, 1 / squares))), "it is no root"


def _fits(rows: Tensor) -> bool:
    """Whether values at four points lie on a parabola."""
    points = torch.tensor([-1.0, -0.2, 0.5, 1.0], dtype=torch.float64)
    powers = torch.stack([points**power for power in range(4)], 1)
    return bool(torch.isfinite(rows).all() and (torch.linalg.solve(powers, rows)[3].abs() <= 1e-9 * rows.abs().max()).all())


def _ignores_order(built: Built, result: Any) -> None:
    (operand,) = _tensors(built)
    value, a = built.values[operand], arguments(built.node)
    dims = [dim % value.dim() for dim in a["dim"] or range(value.dim())] if value.dim() else []
    moved = value
    for dim in dims:
        moved = moved.flip(dim).roll(1, dim)
    assert agree(_run(built, {operand: moved}), result)
    sizes = [1 if dim in dims else size for dim, size in enumerate(value.shape)]
    left = sizes if a["keepdim"] else [size for dim, size in enumerate(sizes) if dim not in dims]
    assert all(list(each.shape) == left for each in flat(result))


def factors(built: Built) -> int:
    """A scale of the value's channels is one of the weight's; the bias is added, and means of values take their shift."""
    return _is_layer(built) + _is_product(built) + _is_mean(built) + _is_norm(built)


def _is_norm(built: Built) -> int:
    """The value less its mean, over the root of its mean square, both over the axes; times the gain, plus the shift."""
    known = row(built.node)
    if known is None or not isinstance(known.role, Normalization):
        return 0
    result = _run(built)
    node = built.node
    if isinstance(result, tuple):
        node = node.graph.call_function(operator.getitem, (node, 0))
        node.meta["val"] = result[0]
    norm, a = operator_norm(node), arguments(built.node)
    assert norm is not None
    assert (norm.kind, norm.axes) == (known.role.kind, known.role.axes(a))
    x, axes = built.values[norm.x], norm.axes
    if norm.kind is NormKind.GROUP_NORM:  # the groups are an axis of their own
        x = x.unflatten(1, (a["num_groups"] if "num_groups" in a else a["group"], -1))
        axes = tuple(axis + 1 for axis in axes)
    mean, square = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    if norm.kind is NormKind.RMS_NORM:
        mean, square = torch.zeros_like(mean), x.square().mean(axes, keepdim=True)
    if a.get("running_mean") is not None:
        assert list(mean.shape[:2]) in ([1, x.shape[1]], list(x.shape[:2]))
        mean, square = (built.values[a[name]].view(-1, *[1] * (x.dim() - 2)) for name in ("running_mean", "running_var"))
    expected = ((x - mean) / (square + norm.eps).sqrt()).reshape(built.values[norm.x].shape)
    trailing = norm.kind in (NormKind.LAYER_NORM, NormKind.RMS_NORM)
    for each, apply in ((norm.gain, torch.mul), (norm.shift, torch.add)):
        if each is not None:
            entries = built.values[each]
            expected = apply(expected, entries if trailing else entries.view(-1, *[1] * (expected.dim() - 2)))
    assert agree(flat(result)[0], expected), "it is another norm"
    return 1


def _is_layer(built: Built) -> int:
    names, a = layer(built.node), arguments(built.node)
    if names is None or rank(a[names.weight]) < 2:
        return 0
    x, weight, bias = (a[name] for name in (names.value, names.weight, names.bias))
    given, kernel = built.values[x], built.values[weight]
    channel, groups = given.dim() - (kernel.dim() - 1), a.get("groups", 1)
    scale = _random(given.shape[channel])
    scaled = _run(built, {x: applied(torch.diag(scale), given, channel)})
    by = a[names.transposed] if isinstance(names.transposed, str) else names.transposed
    inner = scale.view(groups, -1).repeat_interleave(1 if by else kernel.shape[0] // groups, 0)
    shape = (-1, *(1 for _ in kernel.shape[1:])) if by else (*inner.shape, *(1 for _ in kernel.shape[2:]))
    assert agree(scaled, _run(built, {weight: kernel * inner.reshape(shape)})), "its weight takes no scale"
    if bias is not None and built.values[bias].dim() == 1:
        entries = _random(*built.values[bias].shape)
        if len(entries) == flat(scaled)[0].shape[channel]:
            shifted = _run(built, {bias: built.values[bias] + entries})
            assert agree(shifted, _plus(_run(built), channel, entries)), "its bias is not added"
    return 1


def _is_product(built: Built) -> int:
    names, a = product(built.node), arguments(built.node)
    if names is None or min(rank(a[names.value]), rank(a[names.weight])) < 2:
        return 0
    x, weight = a[names.value], a[names.weight]
    scale = torch.diag(_random(built.values[x].shape[-1]))
    by_value = _run(built, {x: applied(scale, built.values[x], rank(x) - 1)})
    assert agree(by_value, _run(built, {weight: applied(scale, built.values[weight], rank(weight) - 2)}))
    if names.term is not None:
        term = built.values[a[names.term]]
        assert agree(_run(built) - _run(built, {a[names.term]: torch.zeros_like(term)}), a["beta"] * term + 0 * by_value)
    return 1


def _is_mean(built: Built) -> int:
    name, a = weighed(built.node), arguments(built.node)
    if name is None or rank(a[name]) < 2 or a.get("dropout_p", 0.0) != 0:
        return 0
    if (mask := a.get("attn_mask")) is not None and built.values[mask].dtype == torch.bool:
        return 0  # `normfuse.analysis.attention` asks whether it leaves every query a key
    role, given = row(built.node).role, built.values[a[name]]  # type: ignore[union-attr]
    ones: Values = {}
    if isinstance(role, Product):
        if rank(a[role.value]) < 2:
            return 0
        ones = {a[role.value]: built.values[a[role.value]].softmax(-1)}
    entries = _random(given.shape[-1])
    shifted = _run(built, {**ones, a[name]: _plus(given, given.dim() - 1, entries)})
    result = _run(built, ones)
    assert agree(shifted, _plus(result, result.dim() - 1, entries)), "a mean of values does not take their shift"
    return 1


def _floats(value: Any) -> list[Tensor]:
    return [each for each in flat(value) if each.is_floating_point()]


def width(built: Built) -> int:
    """With one entry less along an axis of the operands that carry it, a call gives one entry less."""
    node, said = built.node, 0
    result = _run(built)
    for axis in range(rank(node)):
        carried = carries(node, axis)
        size = flat(result)[0].shape[axis]
        if carried is None or not (carried or says_size(node)) or size < 2 or not follows(node, axis):
            continue
        if meets_full_width(node, axis, carried) is not None:
            continue
        less = list(maps(size))[-1][1:]
        args, kwargs = with_size(node, axis, size - 1)
        narrower = node.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        narrower.meta.update(node.meta)
        changed = {operand: applied(less, built.values[operand], own) for operand, own in dict(carried).items()}
        narrow = call(narrower, {**built.values, **changed}, wide=True)
        said += 1
        assert agree(_floats(narrow), _floats(applied(less, result, axis))), f"the size along {axis} does not follow"
    return said


COLUMNS: dict[str, Callable[[Built], int]] = {
    "shift": shift,
    "keeps": kept,
    "computes": computed,
    "role": factors,
    "width": width,
}
