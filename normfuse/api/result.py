"""What a rewrite gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MethodType

from torch import nn

from normfuse.errors import CannotApply, NormfuseError
from normfuse.exporters import eager_cpu
from normfuse.graph.kept_tensors import own_state
from normfuse.graph.program import Program
from normfuse.modules.deploy import apply_plan
from normfuse.report.report import Report
from normfuse.sources.atomic import write_atomically
from normfuse.sources.inputs import Inputs


@dataclass(frozen=True)
class Result:
    """A rewritten model.

    Attributes:
        program: the rewritten program; its new weights are evaluated, or (live mode) computed at every call. It shares tensors
            that nothing changed with the original, and has its own copies of those that it updates.
        report: what was done, refused and proven.
        inputs: the example inputs that it was proven on.
        planned: the same program with its new weights as formulas of the old ones; a further rewrite starts there, so that
            weights are rounded once and what the formulas tell of them is known.
        sources: files that `save` must not overwrite.
        mode: ``deploy`` or ``live``.
        training: the model was traced in training mode, as a live one may be.
    """

    program: Program
    report: Report
    inputs: Inputs
    planned: Program
    sources: tuple[Path, ...] = ()
    mode: str = "deploy"
    training: bool = False

    def module(self) -> nn.Module:
        """A module that is called with the same arguments as the original.

        Tensors that nothing changed are the original's own memory, and those that it updates at every call are its own copies.
        In live mode it is the original in another form: its parameters and buffers are the original's own, under the same
        names; train either, and both are. ``eval()`` leaves it as it is, and ``train()`` says what it cannot do.
        On a CPU the norms are spelled as torch runs them fastest operator by operator; see `normfuse.exporters.eager_cpu`.
        """
        if self.mode == "live":
            return in_its_mode(self.program.module(), self.training)
        return in_its_mode(own_state(eager_cpu.for_cpu(self.planned, self.program)).module(), False)

    def apply_to(self, model: nn.Module, *, keep: bool = False) -> nn.Module:
        """Make the same plan on the live module that was rewritten, in place; see `deploy`.

        Args:
            model: the module that `rewrite` was given.
            keep: keep the module's own tensors, so that `restore` can put them back.

        Returns:
            The same object.

        Raises:
            CannotApply: part of the plan has no place on modules; nothing is changed.
            VerificationFailed: the module is not equivalent afterwards; it is put back.
        """
        if self.mode == "live":
            raise CannotApply(["a live program is no plan for modules"], hint="normfuse.tune(model, ...) makes modules live")
        apply_plan(model, self.report.plan, self.inputs, keep=keep)
        return model

    def save(self, path: str | Path) -> Path:
        """Write ``.pt2`` atomically; `torch.export.load` opens it without normfuse. What is live stays live.

        Raises:
            InputError: the path is the input file, or its folder does not exist.
        """
        write_atomically(Path(path), self.program.save, never_over=self.sources)
        return Path(path)


def in_its_mode(module: nn.Module, training: bool) -> nn.Module:
    """A traced module, which `train` and `eval` leave in the one mode that it is."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode is not training:
            traced, wanted = ("training", "evaluation") if training else ("evaluation", "training")
            raise NormfuseError(
                f"this is the model as it was traced, in {traced} mode; it cannot be set to {wanted} mode",
                hint="rewrite the model again" if training else 'rewrite(model.train(), ..., mode="live") makes one to train',
            )
        return self

    for each in module.modules():
        each.training = training
    module.train = MethodType(train, module)  # type: ignore[method-assign]
    module.eval = MethodType(lambda self: self.train(False), module)  # type: ignore[method-assign]
    return module
