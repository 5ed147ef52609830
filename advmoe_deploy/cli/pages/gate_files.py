"""Files that a gate leaves for other programs: JUnit's XML, and a summary in Markdown."""

import re
from xml.etree import ElementTree as ET

from advmoe_deploy.reports.text import in_markdown
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.verify.examples.gate import Check, GateReport

# What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKS = {"passed": "passed", "failed": "**failed**", "undecided": "**undecided**"}


def junit(report: GateReport) -> bytes:
    """Return XML as JUnit writes it: a test case per check; an undecided one is an error."""
    counted = [check.verdict for check in report.checks]
    suite = ET.Element(
        "testsuite",
        name=_text(f"advmoe gate: {report.bundle} against {report.baseline}"),
        tests=str(len(counted)),
        failures=str(counted.count("failed")),
        errors=str(counted.count("undecided")),
        skipped="0",
        time=f"{report.seconds:.3f}",
    )
    for check in report.checks:
        _add_case(suite, check)
    if report.notes:
        ET.SubElement(suite, "system-out").text = _text("\n".join(report.notes))
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _add_case(suite: ET.Element, check: Check) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        classname="advmoe.gate",
        name=_text(check.name),
        time=f"{check.seconds:.3f}",
    )
    tags = {"failed": "failure", "undecided": "error", "passed": "system-out"}
    inside = ET.SubElement(case, tags[check.verdict])
    inside.text = _text(check.message)
    if check.verdict != "passed":
        inside.set("type", check.verdict)
        inside.set("message", _text(check.message))


def markdown(report: GateReport) -> bytes:
    """Return a summary for people: the verdict, a row per check, and the notes."""
    seen = report.report
    lines = [
        f"## advmoe gate: {_MARKS[report.verdict]}",
        "",
        f"{_cell(report.bundle)} on {_cell(report.engine)}, against {_cell(report.baseline)}: "
        f"{report.images:,} images of {_cell(seen.data)}, epsilon "
        f"{epsilon_text(seen.threat.epsilon)}, {report.seconds:.0f} s.",
        "",
        "| check | verdict | |",
        "|---|---|---|",
        *(f"| {_cell(c.name)} | {_MARKS[c.verdict]} | {_cell(c.message)} |" for c in report.checks),
        *(["", *(f"- {_cell(note)}" for note in report.notes)] if report.notes else []),
    ]
    return ("\n".join(lines) + "\n").encode()


def _cell(text: str) -> str:
    """Return ``text`` for a cell of a table: one line, in which nothing is markup."""
    return in_markdown(" ".join(text.split()))


def _text(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
