"""Evidence as JUnit XML."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree as xml

from normfuse.escaping import escaped
from normfuse.proof.evidence import Evidence, Verdict


def junit(evidence: Evidence, name: str) -> str:
    """The cases as JUnit XML, for CI systems: each as algebra, and as it runs in its own dtype.

    A case that shows nothing is skipped; where that leaves the question open, a case of its own is an error, since a CI takes
    a skipped test for a good one.
    """
    rows = [(each.case, each.verdict, f"outputs differ by {each.error:.1e}, allowed {each.allowed:.1e}")
            for each in evidence.algebra]  # fmt: skip
    rows += [(f"{each.case}, as stored", each.verdict, f"off by {each.after:.1e}, the reference by {each.before:.1e}")
             for each in evidence.rounding]  # fmt: skip
    rows += [("called as a user calls it", Verdict.DISPROVEN, each) for each in evidence.objections]
    told = [(label, _JUNIT[verdict], message) for label, verdict, message in rows]
    if evidence.verdict is Verdict.NOT_COMPARED:
        told.append(("anything was compared", "error", evidence.complaint()))
    name, told = escaped(name), escaped(told)
    tags = Counter(tag for _, tag, _ in told)
    counted = {"tests": len(told), "failures": tags["failure"], "errors": tags["error"], "skipped": tags["skipped"]}
    suite = xml.Element("testsuite", {"name": name, **{key: str(value) for key, value in counted.items()}})
    for label, tag, message in told:
        case = xml.SubElement(suite, "testcase", classname=name, name=label)
        if tag:
            said = "there was nothing to compare" if tag == "skipped" else message
            xml.SubElement(case, tag, message=said)
    xml.indent(suite)
    return xml.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


_JUNIT = {Verdict.PROVEN: "", Verdict.DISPROVEN: "failure", Verdict.NOT_COMPARED: "skipped"}
"""A verdict -> the tag that says so."""
