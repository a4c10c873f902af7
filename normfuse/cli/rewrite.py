"""`normfuse rewrite`: plan, prove, write; `--strict` and `--locked` become exit codes here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.console import RenderableType
from rich.text import Text

from normfuse.cli.console import NO, YES
from normfuse.errors import InputError, VerificationFailed
from normfuse.escaping import escaped

if TYPE_CHECKING:
    from normfuse.report.report import Report
from normfuse.cli.console import tell, working
from normfuse.cli.files import beside, check_absent, check_writable, write_file, writes_back, wrote
from normfuse.cli.options import Source, known_passes, with_answer, with_source


# fmt: off
@click.command()
@click.argument("model")
@click.option("--pass", "passes", multiple=True, required=True, metavar="NAME", callback=known_passes,
              help="A pass to run, or all; may be given again. See normfuse passes.")
@click.option("-o", "--output", metavar="OUT",
              help="Where to write: a folder for a folder, a checkpoint for a checkpoint, or OUT.pt2 for a program. "
                   "[default=beside MODEL, MODEL's name + .rewritten]")
@click.option("--as-code", is_flag=True,
              help="Of a transformers folder: write a modeling file beside the tensors, in which the norms are RMSNorm; it "
                   "loads with trust_remote_code=True. Without it the folder is for the stock class.")
@click.option("--mode", type=click.Choice(["deploy", "live"]), default="deploy", show_default=True, metavar="MODE",
              help="deploy evaluates the new weights; live writes a program to train, which keeps MODEL's own parameters and "
                   "computes the new weights from them at every call.")
@click.option("--dry-run", is_flag=True, help="Plan and print only: no model is written and nothing is proven.")
@click.option("--strict", is_flag=True,
              help="If a pass rewrote nothing (with all: if no pass rewrote anything), write no model and exit 1.")
@click.option("--verify", type=click.Choice(["full", "regions", "structure", "none"]), default="full", show_default=True,
              metavar="LEVEL",
              help="What to prove: full runs both models in float64 and in their own dtype, regions does so with each region "
                   "of the rewrite by itself (for large models), structure runs nothing, or none.")
@click.option("--allow", type=click.Choice(["exact", "rounding", "approximate"]), default="rounding", show_default=True,
              metavar="CLAIM", help="The weakest claim that a rewrite may make: exact, rounding or approximate.")
@click.option("--only", multiple=True, metavar="GLOB",
              help='Rewrite only these norms: paths of modules, such as "*.ln_1"; may be given again.')
@click.option("--keep", "skip", multiple=True, metavar="GLOB",
              help='Leave these norms as they are, such as "transformer.h.0.*"; may be given again.')
@click.option("--keep-unread", is_flag=True,
              help="Keep tensors that the result does not read, such as those of a folded norm.")
@click.option("--report", metavar="FILE", help="Write the report as JSON: what was rewritten, refused and proven.")
@click.option("--plan", metavar="FILE", help="Write the plan as JSON: the edits, with the formula of every new weight.")
@click.option("--locked", metavar="FILE",
              help="A plan that --plan wrote: if this model would be rewritten differently, write nothing and exit 1.")
@with_source
@with_answer
def rewrite(model: str, passes: Any, output: str | None, as_code: bool, mode: str, dry_run: bool, strict: bool, verify: str,
            allow: str, only: tuple[str, ...], skip: tuple[str, ...], keep_unread: bool, report: str | None, plan: str | None,
            locked: str | None, source: Source, as_json: bool) -> int:
    # fmt: on
    """Rewrite the norms of MODEL, prove that its outputs stay the same, and write the result.

    What was brought is what is written: a folder or a checkpoint with the same files, in which only rewritten tensors differ
    and which its own class loads; of a pickled module or a program, a torch.export program (OUT.pt2), which torch.export.load
    opens without normfuse. It is written only if there was something to rewrite, and it is proven first.

    Started by torchrun (torchrun --nproc-per-node 4 -m normfuse rewrite ...), all processes write files of a folder.
    """
    started, written, tensors = time.perf_counter(), None, None
    with working("loading and tracing") as progress:
        from normfuse import api
        from normfuse.planning.lockfile import drift, read_lock
        from normfuse.report.text import written_lines
        from normfuse.sources.modeling_code import WITHOUT

        held = source.opened(model)
        target = Path(output) if output else beside(held, "rewritten", program=mode == "live")
        back = mode == "deploy" and writes_back(held, target)
        if as_code and not back:
            raise InputError("--as-code writes a folder of transformers, and this would be a program", hint=WITHOUT)
        check_writable((None if dry_run or back else target, report, plan), (model, source.path, locked))
        check_absent(target if back and not dry_run else None)
        lock = read_lock(locked) if locked else None
        try:
            result = api.rewrite(
                held, passes, source.inputs(held), mode=mode, verify="none" if dry_run else verify, allow=allow,
                only=only, skip=skip, keep_unread=keep_unread, same_class=back, progress=progress,
            )  # fmt: skip
        except VerificationFailed as failure:
            write_file(report, failure.report.to_json())
            raise
        drifted = drift(lock, result.report.plan) if lock else []
        code, ending = _outcome(result.report, passes == "all", strict, dry_run, drifted)
        if not ending:
            tensors = result.write_back(target, as_code=as_code, progress=progress) if back else None
            written = str(tensors.path if tensors else result.save(target))
            ending = wrote(written, started)
        write_file(report, result.report.to_json())
        write_file(plan, result.report.plan.to_json())
    data = {**result.report.to_dict(), "dry_run": dry_run, "written": written, "drift": drifted}
    data |= {"tensors": tensors.to_dict()} if tensors else {}
    listing: list[RenderableType] = ["", *written_lines(tensors)] if tensors else []
    return tell(as_json, data, *result.report.render(), *listing, "", Text(ending, "bold")) or code


def _outcome(report: Report, everything: bool, strict: bool, dry_run: bool, drifted: list[str]) -> tuple[int, str]:
    """The exit code, and why no model is to be written (empty if it is)."""
    done = any(report.plan.rewrites)
    if drifted:
        return NO, "\n".join(["--locked: the plan is another one; nothing written", *escaped(drifted)])
    if strict and report.idle_passes and not (everything and done):
        return NO, f"--strict: {', '.join(report.idle_passes)} rewrote nothing; nothing written"
    if not done:
        return YES, "nothing to rewrite; nothing written"
    return YES, "dry run: no model written" if dry_run else ""
