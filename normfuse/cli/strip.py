"""`normfuse strip`: remove the norms that can go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.text import Text

from normfuse.cli.console import NO, tell, working
from normfuse.cli.files import beside, check_writable, write_file, wrote
from normfuse.cli.options import Opening, with_answer, with_data

if TYPE_CHECKING:
    from normfuse.sources.inputs import Inputs


@click.command()
@click.argument("model")
@click.option("--calibration", metavar="CAL.json", help="What `normfuse calibrate` wrote; measured on DATA if it is not given.")
@click.option("--max-loss-increase", required=True, type=click.FloatRange(min=0.0), metavar="NATS",
              help="By how much the mean cross-entropy on DATA may rise; nothing is written above it.")  # fmt: skip
@click.option("-o", "--output", metavar="OUT.pt2", help="Where to write. [default=beside MODEL, MODEL's stem + .stripped.pt2]")
@click.option("--report", metavar="FILE", help="Write the report as JSON: what was removed, what it costs, the proof.")
@with_data
@with_answer
def strip(
    model: str, calibration: str | None, max_loss_increase: float, output: str | None, report: str | None, data: str,
    batches: Callable[[], list[Inputs]], opening: Opening, as_json: bool,
) -> int:  # fmt: skip
    """Remove, without training, as many LayerNorms of MODEL as a bound on the loss allows, and fold what is left of them.

    The result is another function (claim approximate): what it costs is measured on DATA and told. Without a norm that can go
    within the bound, nothing is written and the exit code is 1.
    """
    started = time.perf_counter()
    with working("loading and tracing") as progress:
        from normfuse.stripping import removal

        held = opening.opened(model)
        target = Path(output) if output else beside(held, "stripped", program=True)
        check_writable((target, report), (model, data, calibration))
        stripped = removal.strip(held, batches(), calibration, max_loss_increase=max_loss_increase, progress=progress)
        written = str(stripped.save(target)) if stripped.report.removed else None
        write_file(report, stripped.report.to_json())
    ending = wrote(written, started) if written else "no norm can go within the bound; nothing written"
    answer = tell(
        as_json, {**stripped.report.to_dict(), "written": written}, *stripped.report.render(), "", Text(ending, "bold")
    )
    return answer if written else NO
