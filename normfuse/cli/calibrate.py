"""`normfuse calibrate`: what a model's norms cost on data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import rich_click as click
from rich.text import Text

from normfuse.cli.console import tell, working
from normfuse.cli.files import check_writable
from normfuse.cli.options import Opening, with_answer, with_data
from normfuse.escaping import escaped

if TYPE_CHECKING:
    from normfuse.sources.inputs import Inputs


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="CAL.json", help="The calibration file to write.")
@with_data
@with_answer
def calibrate(model: str, output: str, data: str, batches: Callable[[], list[Inputs]], opening: Opening, as_json: bool) -> int:
    """Measure on DATA how constant the deviation of each LayerNorm of MODEL is, and write that to a file.

    `normfuse strip` removes those that cost little.
    """
    check_writable([output], (model, data))
    with working("loading and tracing") as progress:
        from normfuse.stripping import calibration

        found = calibration.calibrate(opening.opened(model), batches(), progress=progress)
        found.save(output)
    data_ = {**found.to_dict(), "written": output}
    return tell(as_json, data_, *found.render(), "", Text(escaped(f"wrote {output}"), "bold"))
