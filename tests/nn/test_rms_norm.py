"""RMSNorm and CRMSNorm against the formula in float64, torch's module and LayerNorm; where they run fast, and where not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import normfuse
from normfuse.nn import CRMSNorm, RMSNorm
from normfuse.nn import rms_norm as module_under_test

D = 12
HALVES = [torch.float16, torch.bfloat16]


def gained(*shape: int, kind: type[nn.RMSNorm] = RMSNorm, eps: float | None = 3e-3, **options: Any) -> nn.RMSNorm:
    """With a gain that has a zero, a negative entry and no two alike."""
    norm = kind(shape, eps, **options)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2.1, norm.weight.numel()).view(shape))
        norm.weight.view(-1)[1] = 0
    return norm


def twin(norm: nn.RMSNorm) -> nn.RMSNorm:
    """Torch's module with the same gain."""
    plain = nn.RMSNorm(norm.normalized_shape, norm.eps, norm.elementwise_affine, dtype=norm.weight.dtype)
    plain.load_state_dict(norm.state_dict())
    return plain


def exact(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.detach().double()
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.detach().double()


class Operators(TorchDispatchMode):
    """Notes what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(norm: nn.Module, x: Tensor) -> list[str]:
    norm(x)  # scalars are made once
    with Operators() as noted:
        norm(x)
    return noted.names


# ---- numbers


@settings(max_examples=150, deadline=None)
@given(
    outer=st.lists(st.integers(0, 5), max_size=3),
    size=st.integers(1, 70),
    eps=st.sampled_from([1e-12, 1e-6, 1e-5, 3.7e-4, 0.4, 7.0]),
    magnitude=st.sampled_from([1e-25, 1e-9, 1e-3, 1.0, 1e4, 1e15]),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    affine=st.booleans(),
    differentiated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_formula(
    outer: list[int], size: int, eps: float, magnitude: float, offset: float, affine: bool, differentiated: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    norm = RMSNorm(size, eps, affine, dtype=dtype)
    if affine:
        nn.init.normal_(norm.weight)
    x = ((torch.randn(*outer, size, dtype=dtype) + offset) * magnitude).requires_grad_(differentiated)
    with torch.set_grad_enabled(differentiated):
        y = norm(x)
    assert (y.shape, y.dtype, y.requires_grad) == (x.shape, dtype, differentiated)
    roundings = 8 if dtype == torch.float32 else 64  # the reference rounds as well
    torch.testing.assert_close(y.double(), exact(x, norm.weight, eps), rtol=roundings * torch.finfo(dtype).eps, atol=1e-37)


@pytest.mark.parametrize("size", [768, 4096, module_under_test.LONGEST, module_under_test.LONGEST + 1, 100_000])
def test_long_rows_are_rounded_as_torch_rounds(size: int) -> None:
    x = torch.randn(16, size) * 3 + 1
    with torch.no_grad():
        torch.testing.assert_close(RMSNorm(size, 1e-5)(x).double(), exact(x, None, 1e-5), rtol=6e-7, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("differentiated", [True, False])
def test_halves_accumulate_in_float32(dtype: torch.dtype, magnitude: float, differentiated: bool) -> None:
    norm, x = gained(500).to(dtype), (torch.randn(4, 500) * magnitude).to(dtype)
    before = x.clone()
    with torch.set_grad_enabled(differentiated):
        y = norm(x)
    assert y.dtype == dtype
    assert torch.equal(x, before)
    reference = exact(x, norm.weight, 3e-3)
    torch.testing.assert_close(y.double(), reference, rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(y, twin(norm)(x), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_the_default_eps_is_torch_s(dtype: torch.dtype) -> None:
    norm, x = RMSNorm(D, dtype=dtype), (torch.randn(3, D) * 1e-4).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), twin(norm)(x))


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("row", [0.0, 1e-30, 1e30, torch.inf, torch.nan])
def test_extreme_rows_are_torch_s(row: float, eps: float) -> None:
    norm, x = gained(D, eps=eps), torch.randn(3, D)
    x[1] = row
    for differentiated in (True, False):
        with torch.set_grad_enabled(differentiated):
            torch.testing.assert_close(norm(x), twin(norm)(x), equal_nan=True)


def test_the_input_is_left_as_it_was() -> None:
    x = torch.randn(4, D)
    before = x.clone()
    with torch.no_grad():
        y = gained(D)(x)
        again = gained(D)(x)
    assert torch.equal(x, before)
    assert torch.equal(y, again)
    assert y.data_ptr() not in (x.data_ptr(), again.data_ptr())


# ---- layouts and shapes

LAYOUTS = {
    "rows of a larger tensor": lambda: torch.randn(5, 2 * D)[:, :D],
    "every other entry": lambda: torch.randn(5, 2 * D)[:, ::2],
    "columns": lambda: torch.randn(2, D, 5).mT,
    "swapped rows": lambda: torch.randn(4, 3, D).transpose(0, 1),
    "one row, seen often": lambda: torch.randn(1, D).expand(4, D),
    "no rows": lambda: torch.randn(0, D),
    "one vector": lambda: torch.randn(D),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False])
def test_layouts(layout: str, affine: bool) -> None:
    norm = gained(D, dtype=torch.float64) if affine else RMSNorm(D, 1e-3, False)
    plain = twin(norm) if affine else nn.RMSNorm(D, 1e-3, False)
    base = LAYOUTS[layout]().double()
    with torch.no_grad():
        torch.testing.assert_close(norm(base), plain(base))
    grads = torch.randn(D, *base.shape[:-1], dtype=torch.float64).movedim(0, -1)
    for grad in (grads, torch.ones((), dtype=torch.float64).expand(base.shape)):
        results = []
        for each in (norm, plain):
            x = base.detach().requires_grad_()
            results.append(torch.autograd.grad(each(x), (x, *each.parameters()), grad))
        for ours, torchs in zip(*results, strict=True):
            torch.testing.assert_close(ours, torchs)


def test_several_axes_and_square_ones() -> None:
    x = torch.randn(6, 6, 6)
    with torch.no_grad():
        for shape in ((6,), (6, 6), (6, 6, 6)):
            torch.testing.assert_close(gained(*shape)(x), twin(gained(*shape))(x))


@pytest.mark.parametrize(
    "x", [torch.randn(2, D + 1), torch.randn(D, 1), torch.tensor(1.0), torch.ones(2, D, dtype=torch.int64)]
)
def test_what_torch_refuses_is_refused(x: Tensor) -> None:
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        twin(gained(D))(x)
    with pytest.raises(type(theirs.value)) as ours:
        gained(D)(x)
    assert str(ours.value) == str(theirs.value)


def test_an_empty_row_is_torch_s() -> None:
    assert RMSNorm(0)(torch.ones(3, 0)).shape == (3, 0)


def test_state_dicts_and_types_are_torch_s() -> None:
    norm = gained(D)
    assert isinstance(norm, nn.RMSNorm)
    assert norm.state_dict().keys() == {"weight"}
    assert repr(norm) == repr(twin(norm))
    assert not RMSNorm(D, elementwise_affine=False).state_dict()
    assert torch.equal(copy.deepcopy(norm).weight, norm.weight)


@pytest.mark.parametrize(
    "kinds", [(torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_gains_of_another_type(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    norm, x = gained(D).to(kinds[1]), torch.randn(3, D).to(kinds[0])
    for differentiated in (True, False):
        with torch.set_grad_enabled(differentiated):
            y, plain = norm(x), twin(norm)(x)
        assert y.dtype == plain.dtype
        torch.testing.assert_close(y, plain)


# ---- gradients


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_first_and_second_order(affine: bool) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(5, 0.02, affine, dtype=torch.float64)
    given = (x, torch.randn(5, dtype=torch.float64, requires_grad=True)) if affine else (x,)

    def call(x: Tensor, *weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, dict(zip(["weight"], weight, strict=False)), x)
        return y

    assert torch.autograd.gradcheck(call, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("frozen", ["input", "gain"])
def test_gradients_of_one_of_two(frozen: str) -> None:
    norm, x = gained(D), torch.randn(3, D)
    norm.weight.requires_grad_(frozen == "input")
    x.requires_grad_(frozen == "gain")
    plain = twin(norm)
    wanted = [(norm.weight, plain.weight)] if frozen == "input" else [(x, x)]
    for ours, theirs in wanted:
        (a,), (b,) = torch.autograd.grad(norm(x).sin().sum(), ours), torch.autograd.grad(plain(x).sin().sum(), theirs)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gradients_are_exact_to_the_rounding_of_their_row(dtype: torch.dtype) -> None:
    norm = gained(D, eps=1e-5).to(dtype)
    x = (torch.randn(4, D) * torch.tensor([[1e3], [1.0], [0.0], [1e-3]])).to(dtype).requires_grad_()
    grad = torch.randn(4, D).to(dtype)
    ours = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    wide = x.detach().double().requires_grad_()
    exactly = torch.autograd.grad(twin(norm).double()(wide), wide, grad.double())[0]
    h = grad.double() * norm.weight.detach().double()
    row = h.abs().amax(-1, keepdim=True) / torch.sqrt(wide.detach().square().mean(-1, keepdim=True) + 1e-5)
    assert all(each.dtype == dtype for each in ours)
    assert ((ours[0].double() - exactly).abs() <= 4 * torch.finfo(dtype).eps * row).all()
    normed = exact(x, None, 1e-5)
    torch.testing.assert_close(ours[1].double(), (grad.double() * normed).sum(0), rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_a_shared_norm_collects_the_gradients_of_both_readers() -> None:
    norm, x, other = gained(D), torch.randn(3, D), torch.randn(2, D)
    plain = twin(norm)
    for each in (norm, plain):
        (each(x).sin().sum() + each(each(other)).cos().sum()).backward()
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad)


def test_autocast_does_not_round_the_gradient() -> None:
    norm, x = gained(D), torch.randn(3, D, requires_grad=True)
    (plain,) = torch.autograd.grad(norm(x).sin().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
        (inside,) = torch.autograd.grad(norm(x).sin().sum(), x)
    assert torch.equal(inside, plain)


def test_forward_mode() -> None:
    norm, x, tangent = gained(D), torch.randn(3, D), torch.randn(3, D)
    expected = torch.func.jvp(twin(norm), (x,), (tangent,))[1]
    for differentiated in (True, False):
        with torch.set_grad_enabled(differentiated), forward_ad.dual_level():
            dual: Any = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, tangent)))
            torch.testing.assert_close(dual.tangent, expected)
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (tangent,))[1], expected)


def test_gains_of_an_ensemble() -> None:
    """Under vmap a gain may have an axis that the value has not: nothing can be written in place."""
    norm, x, gains = gained(D), torch.randn(3, D), torch.randn(4, D)
    with torch.no_grad():
        y = torch.vmap(lambda gain: torch.func.functional_call(norm, {"weight": gain}, x))(gains)
    torch.testing.assert_close(y, torch.stack([F.rms_norm(x, (D,), gain, norm.eps) for gain in gains]))


# ---- where it is fast, and where it is torch's


def test_operators() -> None:
    x = torch.randn(3, D)
    with torch.no_grad():
        assert operators(gained(D), x) == ["linalg_vector_norm", "addcmul", "rsqrt_", "mul", "mul_"]
        assert operators(RMSNorm(D, elementwise_affine=False), x) == ["linalg_vector_norm", "addcmul", "rsqrt_", "mul"]
        assert "linalg_vector_norm" not in operators(gained(D), torch.randn(D, D).T)
    names = operators(gained(D), x)
    assert "linalg_vector_norm" in names
    assert "pow" not in names


def test_a_fake_scalar_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_SCALARS", {})
    norm, x = gained(D), torch.randn(3, D)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            norm(x)
        torch.testing.assert_close(norm(x), twin(norm)(x))
        with torch.inference_mode():
            norm(x)
    norm(x).sum().backward()  # a scalar made in inference mode serves training


class Net(nn.Module):
    """Norms with and without a gain, over the last axis and over two."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, 4)
        self.first, self.second = gained(D, eps=7e-6), RMSNorm(D, 1e-6, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.second(torch.relu(self.first(self.up(x)))))
        return y


@pytest.mark.parametrize("strict", [True, False])
def test_exported_it_is_one_operator(strict: bool) -> None:
    net, x = Net().eval(), torch.randn(2, 5, D)
    exported = torch.export.export(net, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.aten.rms_norm.default) == 2
    assert torch.ops.aten.linalg_vector_norm.default not in targets
    found = normfuse.inspect(exported).to_dict()
    assert found["counts"] == {"rms_norm": 2}
    assert [norm["eps"] for norm in found["norms"]] == [7e-6, 1e-6]
    for batch in (torch.randn(2, 5, D), torch.randn(9, 5, D)):
        torch.testing.assert_close(exported.module()(batch), net(batch))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_whole_and_traced() -> None:
    net, x = Net().eval(), torch.randn(2, 5, D)
    torch._dynamo.reset()
    for differentiated in (True, False):
        with torch.set_grad_enabled(differentiated):
            torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))
    with torch.no_grad():
        traced = torch.jit.trace(net, (x,))
        other = torch.randn(3, 1, D)
        torch.testing.assert_close(traced(other), net(other))


@pytest.mark.parametrize(("opset", "operator"), [(20, "SimplifiedLayerNormalization"), (23, "RMSNormalization")])
def test_onnx_runtime_has_one_node_for_it(tmp_path: Path, opset: int, operator: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from normfuse.exporters import onnx, onnxruntime

    net, x = Net().eval(), torch.randn(2, 5, D)
    exported = torch.export.export(net, (x,)).run_decompositions({})
    onnx.export(exported, tmp_path / "net.onnx", opset=opset)
    assert onnxruntime.fused_ops(tmp_path / "net.onnx")[operator] == 2
    (got,) = onnxruntime.run(tmp_path / "net.onnx", onnx.onnx_inputs(exported, (x,)), optimized=True)
    torch.testing.assert_close(torch.from_numpy(got), net(x), rtol=1e-5, atol=1e-5)


# ---- the compressed one


def decompressed(x: Tensor) -> Tensor:
    return torch.cat([x, -x.sum(-1, keepdim=True)], -1)


@settings(max_examples=100, deadline=None)
@given(
    outer=st.lists(st.integers(0, 4), max_size=2),
    size=st.integers(1, 40),
    eps=st.sampled_from([1e-12, 1e-5, 0.3]),
    magnitude=st.sampled_from([1e-9, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 50.0]),
    differentiated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, *HALVES]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_layer_norm_of_the_decompressed(
    outer: list[int],
    size: int,
    eps: float,
    magnitude: float,
    offset: float,
    differentiated: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    factor = min(magnitude, 100) if dtype == torch.float16 else magnitude
    x = ((torch.randn(*outer, size) + offset) * factor).to(dtype)
    x.requires_grad_(differentiated)
    with torch.set_grad_enabled(differentiated):
        y = CRMSNorm(size, eps)(x)
    z = decompressed(x.detach().double())
    scale = torch.sqrt(z.square().mean(-1, keepdim=True) + eps)
    assert (y.dtype, y.requires_grad) == (dtype, differentiated)
    cancelled = z.abs().amax(-1, keepdim=True) if z.numel() else 0  # a sum of opposite numbers keeps their rounding
    bound = 16 * max(torch.finfo(dtype).eps, 2e-16) * (1 + cancelled / scale) if z.numel() else 0
    assert ((y.double() - z[..., :-1] / scale).abs() <= bound).all()
    normed = F.layer_norm(z, (size + 1,), eps=eps)[..., :-1]
    assert ((z[..., :-1] / scale - normed).abs() <= 1e-9).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compressed_layouts(layout: str) -> None:
    x, norm = LAYOUTS[layout]().double(), CRMSNorm(D, 1e-3)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), F.rms_norm(decompressed(x), (D + 1,), None, 1e-3)[..., :-1])


def test_compressed_gradients() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    x[0, 1] = 0
    norm = CRMSNorm([5], 0.02)
    assert torch.autograd.gradcheck(norm, (x.requires_grad_(),), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_compressed_traced_and_mapped() -> None:
    norm, x = CRMSNorm(D, 1e-4), torch.randn(4, 5, D)
    with torch.no_grad():
        expected = norm(x)
        torch.testing.assert_close(torch.vmap(norm)(x), expected)
        torch.testing.assert_close(torch.compile(norm, backend="eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(norm, (x,)).module()(x), expected)
        assert operators(norm, x) == ["linalg_vector_norm", "sum", "addcmul", "addcmul", "rsqrt_", "mul"]


@pytest.mark.parametrize("shape", [0, [2, 3], []])
def test_it_is_over_one_axis(shape: Any) -> None:
    with pytest.raises(ValueError, match="one axis"):
        CRMSNorm(shape)


@pytest.mark.parametrize("x", [torch.ones(2, D + 1), torch.tensor(1.0)])
def test_the_width_is_checked(x: Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        CRMSNorm(D)(x)


def test_pre_crms_is_pre_layer_norm() -> None:
    """Jiang et al., §3.3: last row of the writer dropped, last column of the reader taken from the others."""
    writer, reader = nn.Linear(D, D, dtype=torch.float64), nn.Linear(D, 4, dtype=torch.float64)
    x, norm = torch.randn(7, D, dtype=torch.float64), nn.LayerNorm(D, 2e-3, elementwise_affine=False)
    weight, bias = (each - each.mean(0) for each in (writer.weight, writer.bias))
    compressed = CRMSNorm(D - 1, 2e-3)(F.linear(x, weight[:-1], bias[:-1]))
    y = F.linear(compressed, reader.weight[:, :-1] - reader.weight[:, -1:], reader.bias)
    torch.testing.assert_close(y, reader(norm(writer(x))))
