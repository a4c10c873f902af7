"""What becomes of a BatchNorm, by pattern and by tool, and is the result still the same function? Prints a Markdown table.

    python -m benchmarks.fold_patterns [--tools normfuse torch.fx …] [--only WORD …]

A tool that is not installed has an empty column; `benchmarks/requirements.txt` names them. The exit code is 1 if normfuse
raises or is wrong anywhere.

Every tool gets a model of its own, float32, with weights that hide nothing. What it makes is run on other inputs than it was
traced with and compared with the original model in float64. What is left of the norms is counted in its own last graph: for
inductor after its last graph pass, for ONNX Runtime in the file that it writes after all its optimizations.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

import normfuse
from benchmarks.record import recorded
from normfuse.errors import TraceError
from normfuse.transforms.constant_norms import HALF, LEFT
from tests.batch_norms import FOLDS, IMAGE, Chain, Fold
from tests.models import noise

OURS = "normfuse"
PASS = "offline_norm"
LIMIT = 1e-4  # largest error over largest output: rounding is far below, a wrong fold far above; the table prints the gap

STATES = {
    "folded": "no norm is left, nor any arithmetic in its place",
    "scale-shift": "no norm is left, but arithmetic: at most two operations per norm",
    "partly": "some of the norms are left",
    "kept": "all norms are left, as such or as arithmetic of the same length",
    "not traced": "the tool's tracer stopped at the model",
    "error": "the tool raised",
    "WRONG": "another function",
}


# -- more patterns -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A function of named layers and one input."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        """Whatever the function makes of it."""
        return self.function(self, x)


class Product(nn.Module):
    """A matrix product by hand: (…, inputs) to (…, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x @ self.weight


def branch(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.norm(m.conv(x))
    return torch.relu(y) if x.sum() > 0 else torch.tanh(y)


def functional_norm(m: Any, x: Tensor) -> Tensor:
    return torch.relu(F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, eps=1e-3))


def tied_weights(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(m.norm(m.one(x))), m.two(x)


def conv_and_norm(channels: int = 6, normed: int | None = None) -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(4, channels, 3, padding=1), "norm": nn.BatchNorm2d(normed or channels)}


def write_and_norm(layer: type[nn.Module] = Product) -> dict[str, nn.Module]:
    return {"write": layer(6, 6), "norm": nn.BatchNorm1d(6)}


def two_convs(normed: int) -> dict[str, nn.Module]:
    return {"one": nn.Conv2d(4, 6, 3), "two": nn.Conv2d(4, 6, 3, bias=False), "norm": nn.BatchNorm2d(normed)}


def one_weight() -> nn.Module:
    convs = two_convs(6)
    convs["two"].weight = convs["one"].weight
    return Model(tied_weights, **convs)


SQUARE = (noise(6, 6),)
ROWS = (noise(5, 8),)

MORE: dict[str, Fold] = {
    "linear without bias": Fold(lambda: Chain(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)), ROWS),
    "a product by hand": Fold(lambda: Chain(Product(8, 6), nn.BatchNorm1d(6)), ROWS),
    "linear, square, transposed": Fold(
        lambda: Model(lambda m, x: torch.relu(m.norm(m.write(x).T)), **write_and_norm(nn.Linear)), SQUARE
    ),
    "a product, square, transposed": Fold(
        lambda: Model(lambda m, x: torch.relu(m.norm(m.write(x).T)), **write_and_norm()), SQUARE
    ),
    "a product, reshaped across axes": Fold(
        lambda: Model(lambda m, x: torch.relu(m.norm(m.write(x).reshape(2, 6, 3))), **write_and_norm()), SQUARE
    ),
    "a map flattened": Fold(
        lambda: Model(lambda m, x: torch.relu(m.norm(m.conv(x).flatten(2))), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm1d(6)),
        IMAGE,
    ),
    "before a linear": Fold(lambda: Chain(nn.BatchNorm1d(8), nn.Linear(8, 6)), ROWS),
    "before a grouped conv": Fold(lambda: Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), IMAGE),
    "before a depthwise conv": Fold(lambda: Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4)), IMAGE),
    "before two convs": Fold(
        lambda: Model(lambda m, x: (m.one(y := m.norm(torch.relu(x))), m.two(y)), **two_convs(4)),
        IMAGE,
    ),
    "before an average pool": Fold(lambda: Chain(nn.BatchNorm2d(4), nn.AvgPool2d(3), nn.Conv2d(4, 6, 2)), IMAGE),
    "before a max pool": Fold(lambda: Chain(nn.BatchNorm2d(4), nn.MaxPool2d(3), nn.Conv2d(4, 6, 2)), IMAGE),
    "before a relu": Fold(lambda: Chain(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)), IMAGE),
    "two convs, one weight": Fold(one_weight, IMAGE),
    "a module, a functional norm": Fold(lambda: Model(functional_norm, **conv_and_norm()), IMAGE),
    "a concatenation": Fold(
        lambda: Model(lambda m, x: torch.relu(m.norm(torch.cat([m.one(x), m.two(x)], 1))), **two_convs(12)), IMAGE
    ),
    "half of a conv": Fold(lambda: Model(lambda m, x: torch.relu(m.norm(m.conv(x)[:, :3])), **conv_and_norm(6, 3)), IMAGE),
    "a residual block": Fold(lambda: Model(lambda m, x: torch.relu(m.norm(m.conv(x)) + x), **conv_and_norm(4)), IMAGE),
    "an embedding": Fold(lambda: Chain(nn.Embedding(9, 8), nn.BatchNorm1d(8)), (torch.arange(5),)),
    "a branch on data": Fold(lambda: Model(branch, **conv_and_norm()), IMAGE),
}
PATTERNS = {**FOLDS, **MORE}
IN_THE_NORM = {
    "rep tokens": 2,
    "rep patches": 2,
    "padded windows": 2,
}  # RepBN's αx + …, arithmetic that goes when the norm goes


# -- what is left ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a graph does to values that depend on its inputs.

    Attributes:
        norms: calls of a batch norm.
        arithmetic: additions, subtractions, multiplications and divisions.
    """

    norms: int
    arithmetic: int

    def __add__(self, other: Work) -> Work:
        return Work(self.norms + other.norms, self.arithmetic + other.arithmetic)


@dataclass(frozen=True)
class Call:
    """A node of any graph: what it is, the names that it reads, the names that it writes."""

    op: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "addcmul"}
# inductor hides oneDNN's layers, with their activations, in functions of its module mkldnn_fusion
PRODUCTS = ("conv", "linear", "matmul", "gemm", "mm", "mkldnn")


def work(calls: Iterable[Call], given: Iterable[str]) -> Work:
    """Count. A constant that is added to a product without a bias is its bias; a product that takes a sum along adds it."""
    live, unbiased, done = set(given), set[str](), Work(0, 0)
    for call in calls:
        reads = [name for name in call.reads if name in live]
        if not reads:
            continue
        live |= set(call.writes)
        if "batch" in call.op and "norm" in call.op:
            done += Work(1, 0)
        elif any(word in call.op for word in PRODUCTS):
            done += Work(0, len(reads) - 1)
            unbiased |= set(call.writes) if len(call.reads) < 3 else set()
        elif call.op == "view" and reads[0] in unbiased:
            unbiased |= set(call.writes)
        elif call.op.rstrip("_") in ARITHMETIC and not (call.op == "add" and len(reads) == 1 and reads[0] in unbiased):
            done += Work(0, 1)
    return done


def fx_work(graph: torch.fx.Graph) -> Work:
    """What a graph of aten calls does; its weights are attributes."""
    calls = (
        Call(call_name(node.target), tuple(each.name for each in node.all_input_nodes), (node.name,))
        for node in graph.nodes
        if node.op == "call_function"
    )
    return work(calls, [node.name for node in graph.nodes if node.op == "placeholder"])


def call_name(target: Any) -> str:
    """The overload packet of an operator, or the full name of a function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return f"{target.__module__}.{target.__name__}"


def onnx_work(model: Any) -> Work:
    """What an ONNX model does; ONNX Runtime spells a scale and a shift of an image's channels as a convolution."""
    stored = {tensor.name: tensor.dims for tensor in model.graph.initializer}

    def call(node: Any) -> Call:
        scales = node.op_type == "Conv" and set(stored.get(node.input[1], ())[1:]) == {1}
        return Call("mul" if scales else node.op_type.lower(), tuple(filter(None, node.input)), tuple(node.output))

    calls = map(call, model.graph.node)
    return work(calls, [value.name for value in model.graph.input if value.name not in stored])


# -- tools -------------------------------------------------------------------------------------------------------------


class NotInstalled(Exception):
    """The tool is not here."""


class NotTraced(Exception):
    """The tool's tracer stopped at the model."""


@dataclass(frozen=True)
class Made:
    """What a tool made of a model.

    Attributes:
        run: the new model.
        left: what it does.
        reason: why norms are left, where the tool says so.
    """

    run: Callable[..., Any]
    left: Work
    reason: str = ""


@contextmanager
def tracing() -> Iterator[None]:
    """Tell what the tracer raises from what the tool raises."""
    try:
        yield
    except Exception as error:  # tracers raise anything that the model's forward raises
        raise NotTraced(said(error)) from error


@contextmanager
def needing(*packages: str) -> Iterator[None]:
    """Tell a package that is not here from one that fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in packages:
            raise NotInstalled(error.name) from error
        raise


def aten(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    """The model as a graph of aten calls, nothing decomposed, with its weights as attributes."""
    with tracing():
        module: GraphModule = torch.export.export(model, inputs, strict=False).run_decompositions({}).module()  # type: ignore[assignment]
    return module


def torch_fx(model: nn.Module, inputs: tuple[Any, ...]) -> Made:
    """The pairs of modules that `torch.fx` fuses."""
    from torch.fx.experimental.optimization import fuse

    with tracing():
        traced = torch.fx.symbolic_trace(model)
    fused = fuse(traced)
    return Made(fused, fx_work(aten(fused, inputs).graph))


def inductor(model: nn.Module, inputs: tuple[Any, ...]) -> Made:
    """`torch.compile` with frozen weights; a graph for each piece between graph breaks."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    pieces: list[Work] = []

    class Count(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            pieces.append(fx_work(graph))

        def uuid(self) -> None:
            """None: never take a piece from a cache without counting it."""

    settings = {"freezing": True, "post_grad_custom_post_pass": Count()}
    torch.compiler.reset()
    compiled = torch.compile(model)

    def run(*given: Any) -> Any:
        with config.patch(settings), torch.no_grad():
            return compiled(*given)

    run(*inputs)
    return Made(run, sum(pieces, Work(0, 0)))


def torchao(model: nn.Module, inputs: tuple[Any, ...]) -> Made:
    """What `prepare_pt2e` does before a quantizer that quantizes nothing."""
    with needing("torchao"):
        prepare_pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e").prepare_pt2e
        quantizer: Any = importlib.import_module("torchao.quantization.pt2e.quantizer").Quantizer

    class Nothing(quantizer):  # type: ignore[misc]
        def annotate(self, model: GraphModule) -> GraphModule:
            return model

        def validate(self, model: GraphModule) -> None:
            """Nothing to check."""

    with tracing():
        traced = torch.export.export(model, inputs).module()
    prepared = prepare_pt2e(traced, Nothing())
    return Made(prepared, fx_work(prepared.graph))


def onnx_model(model: nn.Module, inputs: tuple[Any, ...], optimize: bool) -> Any:
    """The model as torch.onnx writes it."""
    with needing("onnx", "onnxscript", "onnxruntime"):
        import onnxruntime  # noqa: F401
        from torch.onnx._internal.exporter._errors import TorchExportError
    try:
        program = torch.onnx.export(model, inputs, dynamo=True, optimize=optimize, verbose=False)
    except TorchExportError as error:
        raise NotTraced(said(error)) from error
    assert program is not None
    return program.model_proto


def session(model: bytes, optimized_file: Path | None = None) -> Callable[..., Any]:
    """Run a file as it is, or as ONNX Runtime optimizes it, and then write that."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimized_file else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    if optimized_file:
        options.optimized_model_filepath = str(optimized_file)
    running = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in running.get_inputs()]
    return lambda *given: [
        torch.from_numpy(each) for each in running.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
    ]


def onnxscript(model: nn.Module, inputs: tuple[Any, ...]) -> Made:
    """`torch.onnx.export`, which optimizes with onnxscript unless told otherwise."""
    made = onnx_model(model, inputs, optimize=True)
    return Made(session(made.SerializeToString()), onnx_work(made))


def onnx_runtime(model: nn.Module, inputs: tuple[Any, ...], *, optimize: bool) -> Made:
    """All graph optimizations of ONNX Runtime, on a file that onnxscript optimized before or nobody did."""
    made = onnx_model(model, inputs, optimize).SerializeToString()
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        run = session(made, path)
        return Made(run, onnx_work(onnx.load(path)))


def onnxslim(model: nn.Module, inputs: tuple[Any, ...]) -> Made:
    """`onnxslim.slim` on a file that nobody optimized before."""
    with needing("onnxslim"):
        slim = importlib.import_module("onnxslim").slim
    made = slim(onnx_model(model, inputs, optimize=False))
    return Made(session(made.SerializeToString()), onnx_work(made))


def ours(model: nn.Module, inputs: tuple[Any, ...]) -> Made:
    """`normfuse.rewrite`, with its proof."""
    try:
        result = normfuse.rewrite(model, passes=[PASS], inputs=inputs)
    except TraceError as error:
        raise NotTraced(said(error)) from error
    refused = [f"{each.code} {each.reason}" for each in result.report.plan.refusals]
    left = [each.because for each in result.report.plan.rewrites if each.because.startswith((HALF, LEFT))]
    module = result.module()
    assert isinstance(module, GraphModule)
    return Made(module, fx_work(module.graph), "; ".join(dict.fromkeys((*refused, *left))))


TOOLS: dict[str, Callable[[nn.Module, tuple[Any, ...]], Made]] = {
    "torch.fx": torch_fx,
    "inductor": inductor,
    "torchao": torchao,
    "onnxscript": onnxscript,
    "onnxslim": onnxslim,
    "onnxruntime": partial(onnx_runtime, optimize=False),
    "onnxscript, onnxruntime": partial(onnx_runtime, optimize=True),
    OURS: ours,
}


# -- the judgement -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A cell of the table.

    Attributes:
        pattern: the row.
        tool: the column.
        state: one of `STATES`, or ``not installed``.
        error: largest difference from the float64 truth over the truth's largest value, if it ran.
        before: what the original does, its norms being one call each.
        left: what the tool's model does, if there is one.
        reason: what the tool says, in its exception or of the norms that it leaves.
    """

    pattern: str
    tool: str
    state: str
    error: float | None = None
    before: Work | None = None
    left: Work | None = None
    reason: str = ""


def judge(name: str, tool: str) -> Outcome:
    """Give one pattern to one tool."""
    fold = PATTERNS[name]
    before = original_work(name)
    try:
        with quiet():
            made = TOOLS[tool](fold.module(), fold.inputs)
            inputs = tree_map(other, fold.inputs)
            error = difference(made.run(*inputs), fold.module().double()(*tree_map(doubled, inputs)))
    except NotInstalled:
        return Outcome(name, tool, "not installed")
    except NotTraced as problem:
        return Outcome(name, tool, "not traced", before=before, reason=str(problem))
    except Exception as problem:  # whatever a tool raises is what we want to know
        return Outcome(name, tool, "error", before=before, reason=f"{type(problem).__name__}: {said(problem)}")
    return Outcome(name, tool, state(before, made.left, error), error, before, made.left, made.reason)


def state(before: Work, left: Work, error: float) -> str:
    """A word of `STATES` for what a tool made."""
    more = left.arithmetic - before.arithmetic
    if not error <= LIMIT:
        return "WRONG"
    if left.norms:
        return "partly" if left.norms < before.norms else "kept"
    if more > 2 * before.norms:
        return "kept"
    return "scale-shift" if more > 0 else "folded"


@cache
def original_work(name: str) -> Work:
    """What the original does beside its norms; of what cannot be traced, the modules are counted."""
    fold = PATTERNS[name]
    model = fold.module()
    try:
        return fx_work(aten(model, fold.inputs).graph) + Work(0, -IN_THE_NORM.get(name, 0))
    except NotTraced:
        return Work(sum(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules()), 0)


def difference(got: Any, truth: Any) -> float:
    """Largest difference over the largest value, over all outputs; infinite for another shape."""
    pairs = list(zip(tree_leaves(got), tree_leaves(truth), strict=True))
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return math.inf
    return float(torch.stack([(ours - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs]).max())


def other(x: Tensor) -> Tensor:
    """Another input of the same shape."""
    return 1.5 * x.flip(0) + 0.3 if x.is_floating_point() else x.flip(0)


def doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def said(error: BaseException) -> str:
    """The first sentence of the exception that started it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(error).splitlines()]
    line = next((line for line in lines if any(map(str.isalpha, line))), type(error).__name__)
    return re.split(r"\. |; |  ", line)[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tools' own talk off the terminal."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


# -- the table ---------------------------------------------------------------------------------------------------------


def table(outcomes: list[Outcome], names: list[str], tools: list[str]) -> Iterator[str]:
    """Rows of patterns, columns of tools, and the sums."""
    cells = {(each.pattern, each.tool): each for each in outcomes}
    yield f"| pattern | {' | '.join(tools)} |"
    yield "|---" * (len(tools) + 1) + "|"
    for name in names:
        yield f"| {name} | {' | '.join(cell(cells[name, tool].state) for tool in tools)} |"
    counts = {tool: Counter(cells[name, tool].state for name in names) for tool in tools}
    for each in STATES:
        yield f"| **{each}** | {' | '.join(str(counts[tool][each]) for tool in tools)} |"


def cell(state: str) -> str:
    return f"**{state}**" if state == "WRONG" else "–" if state == "not installed" else state


def remarks(outcomes: list[Outcome]) -> Iterator[str]:
    """The gap between rounding and wrong, and what the tools said, once for all patterns of which they said it."""
    right = [each.error for each in outcomes if each.error is not None and each.state != "WRONG"]
    wrong = [each.error for each in outcomes if each.error is not None and each.state == "WRONG"]
    gap = f", smallest of a wrong one: {min(wrong):.1e}" if wrong else ""
    yield f"Largest error of a right result: {max(right, default=0):.1e}{gap}.\n"
    said: dict[tuple[str, str, str], list[str]] = {}
    for each in outcomes:
        if each.state == "WRONG":
            said.setdefault((each.tool, each.state, ""), []).append(f"{each.pattern} (by {each.error:.2g})")
        elif each.reason:
            said.setdefault((each.tool, each.state, f": {each.reason}"), []).append(each.pattern)
    for (tool, word, reason), names in sorted(said.items()):
        yield f"- {tool}, {word}{reason} – {'; '.join(names)}"


def versions() -> str:
    """The packages that took part."""
    found = []
    for name in ("torch", "torchao", "onnxscript", "onnxruntime", "onnxslim", OURS):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--only", nargs="+", default=[""], help="patterns whose name has one of these words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in PATTERNS if any(word in name for word in options.only)]
    pairs = [(name, tool) for name in names for tool in options.tools]
    outcomes = [judge(*pair) for pair in track(pairs, "judging", console=Console(stderr=True))]
    print(f"{versions()}; pass {PASS}\n")
    print(*table(outcomes, names, options.tools), "", *remarks(outcomes), sep="\n")
    return int(any(each.tool == OURS and each.state in {"error", "WRONG"} for each in outcomes))


if __name__ == "__main__":
    recorded(main)
