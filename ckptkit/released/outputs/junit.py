"""A check's report as JUnit XML: a suite a file, a case a rule.

JUnit has no specification of its own; two schemas are in use, and the document is valid against both: that of Ant's
``junit`` task (attributes ``package``, ``id``, ``hostname`` and ``timestamp`` without a zone on each suite; elements
``properties``, ``system-out`` and ``system-err`` in it; at most one ``failure`` or ``error`` in a case), and
``junit-10.xsd`` of Jenkins' xUnit plugin, which allows more.  A ``failure`` is a rule that is not kept, an
``error`` one that could not be applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from ckptkit.released.results import CheckFinding, CheckReport, FileResult
from ckptkit.report import printable

__all__ = ["render"]


def render(report: CheckReport) -> str:
    """The document."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', "<testsuites>"]
    for number, result in enumerate(report.results):
        lines += _suite(number, result, report.started)
    return "\n".join([*lines, "</testsuites>", ""])


def _suite(number: int, result: FileResult, started: str) -> Iterator[str]:
    cases = [(rule, [f for f in result.findings if f.rule == rule]) for rule in result.rules]
    failing = [[f for f in found if f.severity == "error"] for _, found in cases]
    errors = sum(any(f.is_unchecked for f in found) for found in failing)
    failures = sum(bool(found) for found in failing) - errors
    yield (
        f'  <testsuite name="{_xml(result.path)}" package="ckptkit.check" id="{number}" timestamp="{started}" '
        f'hostname="localhost" tests="{len(cases)}" failures="{failures}" errors="{errors}" '
        f'time="{result.seconds:.3f}">'
    )
    yield "    <properties>"
    for name, value in (("size", result.size), ("sha256", result.sha256)):
        if value is not None:
            yield f'      <property name="{name}" value="{value}"/>'
    yield "    </properties>"
    for (rule, _), found in zip(cases, failing, strict=True):
        yield from _case(result.path, rule, found)
    notes = [f"{f.severity}: {f.message} [{f.code}]" for f in result.findings if f.severity != "error"]
    yield f"    <system-out>{_xml_lines(notes)}</system-out>"
    yield "    <system-err></system-err>"
    yield "  </testsuite>"


def _case(path: str, rule: str, found: list[CheckFinding]) -> Iterator[str]:
    case = f'    <testcase name="{_xml(rule)}" classname="{_xml(path)}" time="0"'
    if not found:
        yield f"{case}/>"
        return
    element = "error" if any(f.is_unchecked for f in found) else "failure"
    first = found[0]
    more = f" (and {len(found) - 1} more)" * (len(found) > 1)
    yield f"{case}>"
    texts = [line for f in found for line in (f"{f.code}: {f.message}", *([f"fix: {f.fix}"] if f.fix else []))]
    yield (
        f'      <{element} type="{_xml(first.code)}" message="{_xml(first.message + more)}">'
        f"{_xml_lines(texts)}</{element}>"
    )
    yield "    </testcase>"


def _xml(text: str) -> str:
    """Text as XML may hold it: what is not printable, and with it every character XML forbids, is escaped."""
    return escape(printable(text))


def _xml_lines(lines: list[str]) -> str:
    return "\n".join(map(_xml, lines))
