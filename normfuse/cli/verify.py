"""`normfuse verify`: evidence that two models are one function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click
from rich.text import Text

from normfuse.cli.console import CANNOT, NO, YES
from normfuse.escaping import escaped

if TYPE_CHECKING:
    from normfuse.proof.evidence import Evidence
from normfuse.cli.console import rendered, tell, working
from normfuse.cli.files import check_writable, write_file
from normfuse.cli.options import Source, with_answer, with_source


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--junit", metavar="FILE", help="Write the cases as JUnit XML.")
@click.option("--html", metavar="FILE", help="Write the evidence as a page.")
@click.option("--bisect", "bisects", is_flag=True, help="If they differ, find the first node where two programs part.")
@with_source
@with_answer
def verify(a: str, b: str, junit: str | None, html: str | None, bisects: bool, source: Source, as_json: bool) -> int:
    """Compare the models A and B on ordinary and on hostile inputs; exit 1 if they are not the same function.

    Exit 2 if nothing was compared, as where all outputs are NaN: that is neither a yes nor a no.

    Each may be a model file, an .onnx file, OpenVINO's .xml, an ExecuTorch .pte, a TensorRT engine or an AOTInductor package,
    and runs in its own runtime. Their weights may be rounded differently.
    """
    check_writable([junit, html], (a, b, source.path))
    with working("loading and tracing") as progress:
        from normfuse.api import verification
        from normfuse.report.evidence_text import differences_table
        from normfuse.report.html import html as page
        from normfuse.report.junit import junit as suite

        one, other = source.opened(a), source.opened(b)
        given = source.inputs(one if not isinstance(one, str) else other)
        evidence = verification.verify(one, other, given, trust_pickle=source.opening.trust_pickle, progress=progress)
        parting = None
        if bisects and evidence.verdict == "disproven":
            parting = verification.bisect(one, other, given, trust_pickle=source.opening.trust_pickle)
        because = None if evidence.ok else evidence.complaint()
        ending = _answered(evidence)
        parts = [escaped(str(parting))] if parting else []
        lines = [*rendered(evidence), differences_table(evidence.differences), "", *parts]
        write_file(junit, suite(evidence, f"normfuse verify {a} {b}"))
        write_file(html, page([*lines, ending], f"normfuse verify {a} {b}"))
    data = {"a": a, "b": b, "equivalent": evidence.ok, "verdict": evidence.verdict, "because": because}
    data |= {"hint": evidence.missing.hint if evidence.missing else None, "evidence": evidence.to_dict()}
    data |= {"parts_at": parting.to_dict() if parting else None} if bisects else {}
    return tell(as_json, data, *lines, ending) or {"proven": YES, "disproven": NO, "not compared": CANNOT}[evidence.verdict]


def _answered(evidence: Evidence) -> Text:
    """The last line of `verify`."""
    if evidence.ok:
        return Text("equivalent", "bold green")
    if evidence.missing and evidence.verdict == "not compared":
        said = f": {escaped(evidence.missing.reason)}\nhint: {escaped(evidence.missing.hint)}"
        return Text.assemble(("NOT COMPARED", "bold yellow"), said)
    return Text(escaped(f"NOT equivalent: {evidence.complaint()}"), "bold red")
