"""The proof calls what is written, loaded back; `verify` calls models as their users do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import normfuse
from normfuse.cli import main
from normfuse.errors import InputError, VerificationFailed
from normfuse.graph.kept_tensors import only_read
from normfuse.graph.program import Program
from normfuse.proof.evidence import Verdict
from normfuse.proof.loaded_back import SMALL, loaded_back
from normfuse.sources.inputs import Inputs
from tests.models import noise
from tests.zoo.spread import spread

BATCH = Dim("batch", min=1, max=512)
SAVE, LOAD = torch.export.save, torch.export.load


class Tokens(nn.Module):
    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most = most
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.most is not None:
            torch._check(x.shape[0] < self.most)
        return self.down(self.norm(self.up(x))).view(x.shape[0], 3)


def tokens(most: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    return spread(Tokens(most)).eval()


def rewritten(model: nn.Module | None = None, **options: Any) -> normfuse.Result:
    return normfuse.rewrite(model or tokens(), "pre_rmsnorm", inputs=(noise(3, 6),), dynamic_shapes=({0: BATCH},), **options)


def test_the_report_says_where_what_is_written_was_called(tmp_path: Path) -> None:
    result = rewritten()
    evidence = result.report.evidence
    assert evidence.called == ("as given", "smallest dynamic dims", "largest dynamic dims", "dynamic dims between")
    assert not evidence.objections
    assert not evidence.notes
    assert evidence.to_dict()["called"] == list(evidence.called)
    assert not rewritten(verify="structure").report.evidence.called


def faulty_save(change: Callable[[ExportedProgram], None]) -> Callable[..., None]:
    def save(exported: ExportedProgram, *args: Any, **kwargs: Any) -> None:
        change(exported)
        SAVE(exported, *args, **kwargs)

    return save


def add_guard(exported: ExportedProgram) -> None:
    exported._guards_code.append("L['x'].size()[0] < 16")


def narrow_range(exported: ExportedProgram) -> None:
    ranges = exported.range_constraints.items()
    exported._range_constraints = {symbol: type(allowed)(allowed.lower, 15) for symbol, allowed in ranges}


def mangle_tensor(exported: ExportedProgram) -> None:
    name = next(iter(exported.state_dict))
    exported.state_dict[name] = nn.Parameter(exported.state_dict[name] * 1.01)


def drop_residue(exported: ExportedProgram) -> None:
    norm = next(node for node in exported.graph.nodes if "rms_norm" in str(node.target))
    norm.args = (*norm.args[:3], 0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_guard, "a condition on the inputs was added"),
        (narrow_range, "the dynamic size .* and is of"),
        (mangle_tensor, "gives other outputs on 'as given' than were proven"),
        (drop_residue, "gives other outputs on 'as given' than were proven"),
    ],
)
def test_a_faulty_file_is_no_proof(change: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "save", faulty_save(change))
    with pytest.raises(VerificationFailed, match=said) as caught:
        rewritten()
    assert caught.value.report.evidence.verdict is Verdict.DISPROVEN
    assert rewritten(verify="none").program


def specialised(program: Program) -> Program:
    """The program with the example's size in the place of the dynamic one."""
    for node in list(program.graph.nodes):
        if "sym_size" in str(node.target):
            node.replace_all_uses_with(3)  # type: ignore[arg-type]
    return program


def test_a_dim_that_is_specialised_after_the_proof_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.api.rewriting.only_read", lambda program: specialised(only_read(program)))
    with pytest.raises(
        VerificationFailed, match="the written program refuses 'smallest dynamic dims', which the original takes"
    ):
        rewritten()


def test_a_constant_that_is_mangled_after_the_proof_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt = Program.rebuilt

    def faulty(self: Program, root: Any, graph: Any, state: Any = None, constants: Any = None) -> ExportedProgram:
        if state is not None and constants:
            constants = {name: value + 1.0 for name, value in constants.items()}
        return rebuilt(self, root, graph, state, constants)

    class Shifted(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tensor([0.5, 0.25, 2.0])

    def after_the_proof(program: Program) -> Program:
        monkeypatch.setattr(Program, "rebuilt", faulty)
        return only_read(program)

    monkeypatch.setattr("normfuse.api.rewriting.only_read", after_the_proof)
    with pytest.raises(VerificationFailed, match="gives other outputs on 'as given' than were proven"):
        rewritten(spread(Shifted()).eval())


def test_a_file_that_torch_cannot_read_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(file: Any) -> ExportedProgram:
        loaded = LOAD(file)
        if not any("layer_norm" in str(node.target) for node in loaded.graph.nodes):
            raise RuntimeError("unknown operator")
        return loaded

    monkeypatch.setattr(torch.export, "load", load)
    with pytest.raises(VerificationFailed, match="cannot be saved and loaded back: unknown operator"):
        rewritten()


def test_a_model_that_torch_cannot_write_is_called_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> None:
        raise RuntimeError("no serializer")

    monkeypatch.setattr(torch.export, "save", save)
    evidence = rewritten().report.evidence
    assert evidence.called[0] == "as given"
    assert evidence.notes == ("torch cannot save this model, so it was called as it is in memory: no serializer",)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64)
        self.down.weight = nn.Parameter(torch.randn(96, 64).T)  # another layout

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


def test_large_tensors_are_not_copied() -> None:
    program = Program.trace(Wide().eval(), (noise(2, 64),))
    loaded = loaded_back(program)
    large = [name for name in program.tensor_names() if program.tensor(name).numel() > SMALL]
    assert large
    for name in program.tensor_names():
        ours, theirs = program.tensor(name), loaded.state_dict[name]
        assert (ours.data_ptr() == theirs.data_ptr()) is (name in large)
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


class Adapts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.c, self.d, self.e = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(self.d(self.c(self.b(self.norm(self.a(x))))))


def test_what_a_model_updates_is_compared_and_left_alone() -> None:
    model = spread(Adapts()).eval()
    model.norm.train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(noise(5, 6),))
    assert result.report.plan.rewrites
    assert result.report.evidence.called == ("as given",)
    state = {name: each.clone() for name, each in result.program.exported.state_dict.items()}
    assert normfuse.verify(model, result, inputs=(noise(5, 6),)).ok
    assert normfuse.verify(result.program.exported, model, inputs=(noise(5, 6),)).ok
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert all(torch.equal(state[name], each) for name, each in result.program.exported.state_dict.items())


# -- verify ------------------------------------------------------------------------------------------------------------


def exported(model: nn.Module, path: Path) -> str:
    program = torch.export.export(model, (noise(3, 6),), dynamic_shapes=({0: Dim.AUTO},))
    torch.export.save(program, path)
    return str(path)


@pytest.fixture
def twins(tmp_path: Path) -> tuple[str, str]:
    """One function, and the same with a condition on its inputs."""
    return exported(tokens(), tmp_path / "a.pt2"), exported(tokens(16), tmp_path / "b.pt2")


def test_a_model_that_refuses_what_the_other_takes_is_another(twins: tuple[str, str]) -> None:
    a, b = twins
    assert normfuse.verify(a, b, inputs=(noise(4, 6),)).ok
    for one, other in ((a, b), (b, a), (tokens(), b), (torch.export.load(a), torch.export.load(b))):
        evidence = normfuse.verify(one, other, inputs=(noise(20, 6),))
        assert evidence.verdict is Verdict.DISPROVEN
        assert "refuses the inputs 'as given'" in evidence.complaint()
        assert "Guard failed: x.size()[0] <= 15" in evidence.complaint()


def test_sizes_of_the_range_are_called_too(twins: tuple[str, str]) -> None:
    evidence = normfuse.verify(*twins, inputs=(noise(12, 6),))  # the largest that is tried is longer
    assert "refuses the inputs 'largest dynamic dims'" in evidence.complaint()


def test_inputs_that_both_refuse_are_the_fault_of_the_inputs(twins: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="both models refuse these inputs: Guard failed"):
        normfuse.verify(twins[1], twins[1], inputs=(noise(20, 6),))


def test_the_command_line_says_no_in_a_line(twins: tuple[str, str], tmp_path: Path) -> None:
    junit = tmp_path / "j.xml"
    said = CliRunner().invoke(main, ["verify", *twins, "--input", "float32[20,6]", "--junit", str(junit)])
    assert said.exit_code == 1
    (line,) = [line for line in said.output.splitlines() if line.startswith("NOT equivalent")]
    assert "b.pt2 refuses the inputs 'as given'" in line
    assert '<failure message="' + line.removeprefix("NOT equivalent: ").partition(":")[0] in junit.read_text()


def test_rewrite_says_that_the_original_refuses(twins: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="the original refuses these inputs when it is called"):
        normfuse.rewrite(twins[1], "pre_rmsnorm", inputs=(noise(20, 6),))


class Branches(Tokens):
    """Decides in Python what no other values show but those of one example."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if torch.compiler.is_exporting() or bool((x < 500.0).all()) else y + 1.0


def test_a_module_is_called_on_every_example() -> None:
    plain, other = tokens(), spread(Branches()).eval()
    other.load_state_dict(plain.state_dict())
    inputs = Inputs((noise(3, 6),), {}, more=(Inputs((noise(3, 6) + 1000.0,), {}),))
    assert normfuse.verify(plain, plain, inputs=inputs).ok
    for one, another in ((plain, other), (other, plain)):
        evidence = normfuse.verify(one, another, inputs=inputs)
        assert evidence.verdict is Verdict.DISPROVEN
        assert "example 2" in evidence.complaint()


class Dropped(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.dropout(x, 0.5, train=True))


def test_random_outputs_are_compared_on_the_same_numbers() -> None:
    model = spread(Dropped()).eval()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(noise(3, 6),))
    assert result.report.evidence.called == ("as given",)
    assert normfuse.verify(model, result, inputs=(noise(3, 6),)).ok
    assert normfuse.verify(model, model, inputs=(noise(3, 6),)).ok
    assert not normfuse.verify(model, tokens(), inputs=(noise(3, 6),)).ok
