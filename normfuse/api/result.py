"""What a rewrite gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

from torch import nn

from normfuse.errors import CannotApply, InputError, NormfuseError
from normfuse.exporters import eager_cpu
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.kept_tensors import own_state
from normfuse.graph.program import Program
from normfuse.modules.deploy import apply_plan
from normfuse.modules.written_back import Written, write_back
from normfuse.proof.evidence import checked
from normfuse.proof.loaded_back import called_as_written
from normfuse.proof.measuring import Progress
from normfuse.report.report import Report
from normfuse.sources.atomic import write_atomically
from normfuse.sources.inputs import Inputs
from normfuse.sources.modeling_code import WITHOUT
from normfuse.sources.source import Source


@dataclass(frozen=True)
class Result:
    """A rewritten model.

    Attributes:
        form: makes `program`, once.
        report: what was done, refused and proven.
        inputs: the example inputs that it was proven on.
        planned: the same program with its new weights as formulas of the old ones; a further rewrite starts there, so that
            weights are rounded once and what the formulas tell of them is known.
        sources: files that `save` must not overwrite.
        mode: ``deploy`` or ``live``.
        training: the model was traced in training mode, as a live one may be.
        source: what was brought, where it was opened from a file or a folder.
        original: the program before, where a source was brought: what is written back is compared with it.
    """

    form: Callable[[], Program]
    report: Report
    inputs: Inputs
    planned: Program
    sources: tuple[Path, ...] = ()
    mode: str = "deploy"
    training: bool = False
    source: Source | None = None
    original: Program | None = None

    @property
    def program(self) -> Program:
        """The rewritten program; its new weights are evaluated, or (live mode) computed at every call.

        It shares tensors that nothing changed with the original, and has its own copies of those that it updates. Of a folder
        or a checkpoint it is made when it is asked for: what is written back there needs no such tensors in memory.
        """
        return self.form()

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

    def save(self, path: str | Path, *, as_code: bool = False) -> Path:
        """Write the same kind that was brought: a folder or a checkpoint as `write_back` does, and ``.pt2`` of all else.

        A path that ends in ``.pt2`` is always a program, which `torch.export.load` opens without normfuse. What is live stays
        live. Files are complete, or not there.

        Args:
            path: where to write.
            as_code: for a transformers folder: write a modeling file with RMSNorm beside the tensors (docs/as_code.md).

        Raises:
            InputError: the path is the input file, or its folder does not exist.
            CannotApply: the model's class cannot hold what was rewritten; nothing is written.
        """
        if self.is_program(path):
            if as_code:
                raise InputError(
                    "code is written beside the tensors of a transformers folder, and this is a program", hint=WITHOUT
                )
            self._check_program()
            write_atomically(Path(path), self.program.save, never_over=self.sources)
        else:
            self.write_back(path, as_code=as_code)
        return Path(path)

    def is_program(self, path: str | Path) -> bool:
        """Whether what `save` writes at a path is a program, and not what was brought."""
        same = self.mode == "deploy" and self.source is not None and self.source.stored is not None
        return Path(path).suffix == ".pt2" or not same

    def _check_program(self) -> None:
        """Compare a program that was planned for a class, and is written as a program after all, as every other was before."""
        evidence = self.report.evidence
        if self.original is not None and evidence.ok and not evidence.unchanged and not evidence.called:
            flat = flat_inputs(self.original, self.inputs.args, self.inputs.kwargs)
            checked(called_as_written(self.original, self.planned, self.program, flat, evidence), self.report)

    def write_back(self, path: str | Path, *, as_code: bool = False, progress: Progress | None = None) -> Written:
        """Write the folder or the checkpoint that was brought: the same files, in which only rewritten tensors differ.

        What was written is opened again in the model's own class (or the one that was written), strictly, and compared with the
        original before it takes its place.

        Args:
            path: where; a folder must not be there yet.
            as_code: as for `save`.
            progress: called with (what, done, total).

        Returns:
            Which tensors changed, and the evidence.

        Raises:
            InputError: something is at the path, or it cannot be written there; or no folder or checkpoint was brought.
            CannotApply: the model's class cannot hold what was rewritten; nothing is written.
            VerificationFailed: what was written computes something else; it is not kept.
        """
        if self.source is None or self.original is None:
            raise InputError("no folder or checkpoint was brought, so a program is written", hint='result.save("model.pt2")')
        level = self.report.evidence.level
        return write_back(
            self.source, self.original, self.report.plan, self.inputs, Path(path),
            as_code=as_code, level=level, progress=progress,
        )  # fmt: skip


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
