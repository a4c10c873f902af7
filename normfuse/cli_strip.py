"""The commands `calibrate` and `strip`: what a model's norms cost on data, and which of them can go.

Imported by `normfuse.cli` at its end, so that help lists them with the others.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.text import Text

from normfuse.cli import NO, Command, _check_writable, _tell, _with_answer, _working, _write_file, _wrote, main
from normfuse.escaping import escaped

if TYPE_CHECKING:
    from normfuse.inputs import Inputs

DATA = (
    "Inputs of the model from a .pt, .npy, .npz or .safetensors file, a row for every sample. A tensor 'targets' among them "
    "holds the class of every prediction (-100 for none); token ids without targets predict their own successors."
)


def _with_data(command: Command) -> Command:
    """Add the options that tell of the data, and hand over its batches."""

    @click.option("--data", required=True, metavar="FILE", help=DATA)
    @click.option("--batch", default=8, show_default=True, metavar="N", type=click.IntRange(min=1), help="Rows of a batch.")
    @click.option("--trust-pickle", is_flag=True, help="Let the file run whatever code it contains on this machine.")
    @functools.wraps(command)
    def with_data(*, data: str, batch: int, **rest: Any) -> Any:
        def batches() -> list[Inputs]:
            from normfuse.inputs import from_file
            from normfuse.stripping.calibration import batches_of

            return batches_of(from_file(data), batch)

        return command(data=data, batches=batches, **rest)

    return with_data


@main.command()
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="CAL.json", help="The calibration file to write.")
@_with_data
@_with_answer
def calibrate(
    model: str, output: str, data: str, batches: Callable[[], list[Inputs]], trust_pickle: bool, as_json: bool
) -> int:
    """Measure on DATA how constant the deviation of each LayerNorm of MODEL is, and write that to a file.

    `normfuse strip` removes those that cost little.
    """
    _check_writable([output], (model, data))
    with _working("loading and tracing", doing="") as progress:
        from normfuse.stripping import calibration

        found = calibration.calibrate(model, batches(), trust_pickle=trust_pickle, progress=progress)
        found.save(output)
    data_ = {**found.to_dict(), "written": output}
    return _tell(as_json, data_, *found.render(), "", Text(escaped(f"wrote {output}"), "bold"))


@main.command()
@click.argument("model")
@click.option("--calibration", metavar="CAL.json", help="What `normfuse calibrate` wrote; measured on DATA if it is not given.")
@click.option("--max-loss-increase", required=True, type=click.FloatRange(min=0.0), metavar="NATS",
              help="By how much the mean cross-entropy on DATA may rise; nothing is written above it.")  # fmt: skip
@click.option("-o", "--output", metavar="OUT.pt2", help="Where to write. [default=beside MODEL, MODEL's stem + .stripped.pt2]")
@click.option("--report", metavar="FILE", help="Write the report as JSON: what was removed, what it costs, the proof.")
@_with_data
@_with_answer
def strip(
    model: str, calibration: str | None, max_loss_increase: float, output: str | None, report: str | None, data: str,
    batches: Callable[[], list[Inputs]], trust_pickle: bool, as_json: bool,
) -> int:  # fmt: skip
    """Remove, without training, as many LayerNorms of MODEL as a bound on the loss allows, and fold what is left of them.

    The result is another function (claim approximate): what it costs is measured on DATA and told. Without a norm that can go
    within the bound, nothing is written and the exit code is 1.
    """
    started = time.perf_counter()
    target = Path(output) if output else Path(model).parent / f"{Path(model).stem}.stripped.pt2"
    _check_writable((target, report), (model, data, calibration))
    with _working("loading and tracing", doing="") as progress:
        from normfuse.stripping import removal

        stripped = removal.strip(
            model, batches(), calibration, max_loss_increase=max_loss_increase, trust_pickle=trust_pickle, progress=progress
        )
        written = str(stripped.save(target)) if stripped.report.removed else None
        _write_file(report, stripped.report.to_json())
    ending = _wrote(written, started) if written else "no norm can go within the bound; nothing written"
    answer = _tell(
        as_json, {**stripped.report.to_dict(), "written": written}, *stripped.report.render(), "", Text(ending, "bold")
    )
    return answer if written else NO
