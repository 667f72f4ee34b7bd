"""The machine-readable outputs of a check, a function each; the screen is the command's own.

Adding one is a function from a report to text and a line in `OUTPUTS`.

- GitHub's workflow commands: ``::error file=PATH,title=TITLE::MESSAGE``; in values ``%``, carriage returns and newlines
  are escaped with their codes, in properties ``:`` and ``,`` too, as ``@actions/core`` does (``escapeData`` and
  ``escapeProperty`` in https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts).
- JUnit XML has no specification of its own; two schemas are in use, and the document is valid against both: that of
  Ant's ``junit`` task (attributes ``package``, ``id``, ``hostname`` and ``timestamp`` without a zone on each suite;
  elements ``properties``, ``system-out`` and ``system-err`` in it; at most one ``failure`` or ``error`` in a case), and
  ``junit-10.xsd`` of Jenkins' xUnit plugin, which allows more.  A ``failure`` is a rule that is not kept, an ``error``
  one that could not be applied.
- SARIF 2.1.0 is OASIS' (https://docs.oasis-open.org/sarif/sarif/v2.1.0/).  The codes found are the rules, with the
  texts of ``ckptkit explain``; rule, expected and found stand under each result's ``properties``.  GitHub shows no
  result without a line, so each has the first, which says no more than "this file".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from html import escape
from typing import Any
from urllib.parse import quote

from ckptkit.codes import CODES
from ckptkit.extras import __version__
from ckptkit.formats.folder import passed_over_text
from ckptkit.released.results import CheckFinding, CheckReport, FileResult
from ckptkit.report import human_size, printable

__all__ = ["OUTPUTS"]


def _json(report: CheckReport) -> str:
    """The document, on one line; non-ASCII is escaped, so that any terminal and any name will do."""
    return json.dumps(report.to_dict()) + "\n"


_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}


def _github(report: CheckReport) -> str:
    """The lines to print; the last is the verdict, for whoever reads the log."""
    passed_over = [passed_over_text(report.passed_over)] if report.passed_over else []
    lines = (*map(_annotation, report.findings), *passed_over, f"ckptkit check: {report.verdict}")
    return "".join(f"{line}\n" for line in lines)


def _annotation(finding: CheckFinding) -> str:
    fix = f"\nFix: {printable(finding.fix)}" if finding.fix else ""
    path = _property(finding.path.replace(os.sep, "/"))
    title = _property(f"ckptkit {finding.rule}: {finding.code}")
    text = _data(f"{printable(finding.message)}{fix}")
    return f"::{_COMMANDS[finding.severity]} file={path},title={title}::{text}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(printable(text)).replace(":", "%3A").replace(",", "%2C")


def _junit(report: CheckReport) -> str:
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


_MAX_ROWS = 200
"""Findings in the table: the longest comment a forge takes has 65,536 characters."""

_MAX_CELL = 200
"""Characters of a cell."""


def _markdown(report: CheckReport) -> str:
    """The text: the verdict, a table of what is wrong, and the files with their rules folded away."""
    return "\n".join([*_lines(report), ""])


def _lines(report: CheckReport) -> Iterator[str]:
    mark = "passed" if report.exit_code == 0 else "**failed**"
    yield f"## ckptkit check: {mark}"
    yield ""
    yield f"{report.verdict[0].upper()}{report.verdict[1:]}."
    if report.passed_over:
        yield f"\nP{passed_over_text(report.passed_over)[1:]}."
    if report.findings:
        yield ""
        yield "| file | rule | expected | found | |"
        yield "|:--|:--|:--|:--|:--|"
        for finding in report.findings[:_MAX_ROWS]:
            yield _row(finding)
        if len(report.findings) > _MAX_ROWS:
            yield f"\nand {len(report.findings) - _MAX_ROWS:,} more"
    fixes = list(dict.fromkeys(finding.fix for finding in report.findings[:_MAX_ROWS] if finding.fix))
    if fixes:
        yield "\n### To fix it\n"
        for fix in fixes:
            yield f"- {_code(fix)}"
    yield f"\n<details><summary>Files ({len(report.results):,})</summary>\n"
    yield "| file | size | rules | |"
    yield "|:--|--:|:--|:--|"
    for result in report.results[:_MAX_ROWS]:
        size = "" if result.size is None else human_size(result.size)
        outcome = "ok" if result.ok and result.is_checked else "**failed**" if result.is_checked else "**not checked**"
        yield f"| {_code(result.path)} | {size} | {', '.join(result.rules)} | {outcome} |"
    if len(report.results) > _MAX_ROWS:
        yield f"\nand {len(report.results) - _MAX_ROWS:,} more"
    yield "\n</details>"


def _row(finding: CheckFinding) -> str:
    cells = [
        _code(finding.path),
        finding.rule,
        _value(finding.expected),
        _value(finding.found),
        f"{finding.severity}: {_escaped(finding.message)} (`{finding.code}`)",
    ]
    return f"| {' | '.join(cells)} |"


def _value(value: Any) -> str:
    if value is None:
        return ""
    return _code(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def _code(text: str) -> str:
    text = printable(text).replace("`", "'").replace("|", "\\|")
    return f"`{text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1].rstrip(chr(92)) + '…'}`" if text else ""


def _escaped(text: str) -> str:
    """Text in which nothing is markup: names come from a stranger."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in printable(text))


_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def _sarif(report: CheckReport) -> str:
    """The document."""
    codes = sorted({finding.code for finding in report.findings})
    run = {
        "tool": {"driver": {"name": "ckptkit", "version": __version__, "rules": [_rule(code) for code in codes]}},
        "invocations": [{"executionSuccessful": report.is_complete}],
        "columnKind": "unicodeCodePoints",
        "artifacts": _artifacts(report.results),
        "results": [_result(finding, codes) for finding in report.findings],
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rule(code: str) -> dict[str, Any]:
    title, meaning, remedy = CODES[code]
    rule: dict[str, Any] = {"id": code, "shortDescription": {"text": title}, "fullDescription": {"text": meaning}}
    if remedy != "-":
        rule["help"] = {"text": remedy}
    return rule


def _artifacts(results: tuple[FileResult, ...]) -> list[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    for result in results:
        artifact: dict[str, Any] = {"location": {"uri": _uri(result.path)}}
        if result.size is not None:
            artifact["length"] = result.size
        if result.sha256 is not None:
            artifact["hashes"] = {"sha-256": result.sha256}
        known.setdefault(artifact["location"]["uri"], artifact)
    return list(known.values())


def _result(finding: CheckFinding, codes: list[str]) -> dict[str, Any]:
    fix = f" Fix: {finding.fix}" if finding.fix else ""
    same = "\0".join((finding.path, finding.rule, finding.code))
    return {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": _LEVELS[finding.severity],
        "message": {"text": printable(finding.message + fix)},
        "locations": [
            {"physicalLocation": {"artifactLocation": {"uri": _uri(finding.path)}, "region": {"startLine": 1}}}
        ],
        "partialFingerprints": {
            "ckptkit/v1": hashlib.sha256(same.encode("utf-8", "surrogatepass")).hexdigest(),
        },
        "properties": {"rule": finding.rule, "expected": finding.expected, "found": finding.found},
    }


def _uri(path: str) -> str:
    """A path as a reference: relative ones stay relative, to wherever the repository lies."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # no file's name; a manifest may hold any text
        name = path.encode("utf-8", "backslashreplace")
    text = quote(name.replace(os.sep.encode(), b"/"))
    if os.path.isabs(path):
        return f"file://{text}" if text.startswith("/") else f"file:///{text}"
    return text.removeprefix("./") or "."


OUTPUTS: dict[str, Callable[[CheckReport], str]] = {
    "json": _json,
    "junit": _junit,
    "sarif": _sarif,
    "github": _github,
    "markdown": _markdown,
}
"""Every output by the name it has as an option's value."""
