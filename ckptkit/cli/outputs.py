"""What other programs read of a check: GitHub's lines and summary, GitLab's Code Quality, JUnit and SARIF.

- GitHub's workflow commands: ``::error file=PATH,title=TITLE::MESSAGE``; in values ``%``, carriage returns and newlines
  are escaped with their codes, in properties ``:`` and ``,`` too, as ``@actions/core`` does (``escapeData`` and
  ``escapeProperty`` in https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts). Of a step GitHub
  shows ten annotations of each kind, and fifty of a job (its documentation of problem matchers says so): the most
  severe come first, and a line says what is in the log and in the summary alone.
- GitHub's summary of a step is markdown in the file that ``GITHUB_STEP_SUMMARY`` names, of at most 1024 KiB; of a
  longer one nothing is shown (https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands).
- GitLab's Code Quality report is a JSON array (https://docs.gitlab.com/ci/testing/code_quality/): what is wrong, the
  check, a severity of five, the path from the root of the repository, a line, and a fingerprint by which a merge
  request tells old from new.  Of two with one fingerprint it shows one, so each has its own.
- JUnit XML has no specification of its own; two schemas are in use, and the document is valid against both: that of
  Ant's ``junit`` task (attributes ``package``, ``id``, ``hostname`` and ``timestamp`` without a zone on each suite;
  elements ``properties``, ``system-out`` and ``system-err`` in it; at most one ``failure`` or ``error`` in a case), and
  ``junit-10.xsd`` of Jenkins' xUnit plugin, which allows more.  A ``failure`` is a rule that is not kept, an ``error``
  one that could not be applied.
- SARIF 2.1.0 is OASIS' (https://docs.oasis-open.org/sarif/sarif/v2.1.0/).  The codes found are the rules, with the
  texts of ``ckptkit explain``; rule, expected and found are under each result's ``properties``.  GitHub shows no result
  without a line, so each has the first, which says no more than "this file".
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ckptkit.codes import CODES
from ckptkit.extras import __version__
from ckptkit.formats.folder import passed_over_text
from ckptkit.released.results import NOT_CHECKED, exit_code_of, findings_of, verdict_of
from ckptkit.report import listed, printable
from ckptkit.startup import sha256

if TYPE_CHECKING:
    from ckptkit.cli.options import View
    from ckptkit.documents import CheckDocument, CheckedFile, CheckFindingDocument

__all__ = ["add_summary", "github", "gitlab", "junit", "sarif"]


_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}
"""GitHub's commands by severity, the most severe first."""

_MOST_ANNOTATIONS = 10
"""Of each kind that GitHub shows of one step."""

_MOST_SUMMARY = 1024 * 1024
"""Bytes of a step's summary."""


def _gravest_first(document: CheckDocument) -> list[CheckFindingDocument]:
    return sorted(document["findings"], key=lambda finding: [*_COMMANDS].index(finding["severity"]))


def github(document: CheckDocument, view: View) -> Iterator[str]:
    """The lines to print; the last is the verdict, for whoever reads the log."""
    yield from map(_annotation, _gravest_first(document))
    counts = Counter(finding["severity"] for finding in document["findings"])
    hidden = {f"{severity}s": counts[severity] - _MOST_ANNOTATIONS for severity in ("error", "warning")}
    hidden["notices"] = counts["info"] - _MOST_ANNOTATIONS
    told = [f"{count:,} more {kind if count > 1 else kind[:-1]}" for kind, count in hidden.items() if count > 0]
    if told:
        most = f"GitHub shows at most {_MOST_ANNOTATIONS} annotations of a kind"
        yield f"{most}; this log has {listed(told, last=' and ')}"
    if document["passed_over"]:
        yield passed_over_text(document["passed_over"])
    yield f"ckptkit check: {verdict_of(document)}"


def add_summary(document: CheckDocument, view: View, path: str) -> Iterator[str]:
    """Append the report as markdown to GitHub's step summary, the most severe findings first, as far as it fits.

    Yields a line that says why it could not be written; the verdict is reported all the same.
    """
    from ckptkit.cli.markdown import check

    try:
        with Path(path).open("ab") as file:
            start = file.tell()
            lines = [*check({**document, "findings": _gravest_first(document)}, view), ""]
            short = [f"## ckptkit check: {verdict_of(document)}", "", "The log of this step has the findings.", ""]
            texts = ("".join(f"{line}\n" for line in each).encode("utf-8") for each in (lines, short))
            fitting = (each for each in texts if start + len(each) < _MOST_SUMMARY)  # else nothing at all is shown
            file.write(b"\n" * (start > 0) + next(fitting, b""))
    except OSError as error:
        yield f"::warning title=ckptkit::{_data(printable(f'the summary {path} cannot be written: {error.strerror}'))}"


def _annotation(finding: CheckFindingDocument) -> str:
    fix = f"\nFix: {printable(finding['fix'])}" if finding["fix"] else ""
    path = _property(finding["path"].replace(os.sep, "/"))
    title = _property(f"ckptkit {finding['rule']}: {finding['code']}")
    text = _data(f"{printable(finding['message'])}{fix}")
    return f"::{_COMMANDS[finding['severity']]} file={path},title={title}::{text}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(printable(text)).replace(":", "%3A").replace(",", "%2C")


def junit(document: CheckDocument, view: View) -> Iterator[str]:
    """The XML."""
    yield '<?xml version="1.0" encoding="UTF-8"?>'
    yield "<testsuites>"
    for number, (file, findings) in enumerate(findings_of(document)):
        yield from _suite(number, file, findings, view)
    yield "</testsuites>"


def _suite(number: int, file: CheckedFile, findings: Sequence[CheckFindingDocument], view: View) -> Iterator[str]:
    failing = [
        [each for each in findings if each["rule"] == rule and each["severity"] == "error"] for rule in file["rules"]
    ]
    errors = sum(map(_is_unchecked, failing))
    failures = sum(map(bool, failing)) - errors
    yield (
        f'  <testsuite name="{_xml(file["path"])}" package="ckptkit.check" id="{number}" timestamp="{view.started}" '
        f'hostname="localhost" tests="{len(failing)}" failures="{failures}" errors="{errors}" '
        f'time="{view.seconds.get(file["path"], 0):.3f}">'
    )
    yield "    <properties>"
    for name, value in (("size", file["size"]), ("sha256", file["sha256"])):
        if value is not None:
            yield f'      <property name="{name}" value="{value}"/>'
    yield "    </properties>"
    for rule, found in zip(file["rules"], failing, strict=True):
        yield from _case(file["path"], rule, found)
    notes = [f"{f['severity']}: {f['message']} [{f['code']}]" for f in findings if f["severity"] != "error"]
    yield f"    <system-out>{_xml_lines(notes)}</system-out>"
    yield "    <system-err></system-err>"
    yield "  </testsuite>"


def _is_unchecked(found: Sequence[CheckFindingDocument]) -> bool:
    """Whether the rule that found it could not be applied at all."""
    return any(finding["code"] in NOT_CHECKED for finding in found)


def _case(path: str, rule: str, found: list[CheckFindingDocument]) -> Iterator[str]:
    case = f'    <testcase name="{_xml(rule)}" classname="{_xml(path)}" time="0"'
    if not found:
        yield f"{case}/>"
        return
    element = "error" if _is_unchecked(found) else "failure"
    first = found[0]
    more = f" (and {len(found) - 1} more)" * (len(found) > 1)
    yield f"{case}>"
    texts = []
    for each in found:
        texts += [f"{each['code']}: {each['message']}", *([f"fix: {each['fix']}"] if each["fix"] else [])]
    yield (
        f'      <{element} type="{_xml(first["code"])}" message="{_xml(first["message"] + more)}">'
        f"{_xml_lines(texts)}</{element}>"
    )
    yield "    </testcase>"


def _xml(text: str) -> str:
    """Text as XML may hold it: what is not printable, and with it every character XML forbids, is escaped."""
    return escape(printable(text))


def _xml_lines(lines: list[str]) -> str:
    return "\n".join(map(_xml, lines))


_GRAVITIES = {"error": "critical", "warning": "minor", "info": "info"}


def gitlab(document: CheckDocument, view: View) -> Iterator[str]:
    """The Code Quality report; an empty list where nothing was found."""
    known: Counter[str] = Counter()
    issues = []
    for finding in _gravest_first(document):
        fix = f"; fix: {finding['fix']}" if finding["fix"] else ""
        path = _from_root(finding["path"])
        same = "\0".join((path, finding["rule"], finding["code"]))
        known[same] += 1
        is_hostile = finding["code"] == "hostile-name" and finding["severity"] == "error"
        issues.append(
            {
                "description": printable(f"{finding['rule']}: {finding['message']}{fix}"),
                "check_name": finding["code"],
                "fingerprint": _digest(same if known[same] == 1 else f"{same}\0{known[same]}"),
                "severity": "blocker" if is_hostile else _GRAVITIES[finding["severity"]],
                "location": {"path": path, "lines": {"begin": 1}},
            }
        )
    yield json.dumps(issues, indent=2)


def _from_root(path: str) -> str:
    """A path from the root of the repository, which GitLab's runner names, else from the working directory.

    What is elsewhere, or at a URL, is what it was named.
    """
    root = os.environ.get("CI_PROJECT_DIR") or os.curdir
    if "://" not in path and "\0" not in path:
        with suppress(ValueError):  # on another drive
            relative = os.path.relpath(path, root)
            path = path if relative.split(os.sep)[0] == os.pardir else relative
    return printable(path.replace(os.sep, "/"))


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def sarif(document: CheckDocument, view: View) -> Iterator[str]:
    """The log, as one piece of text."""
    codes = sorted({finding["code"] for finding in document["findings"]})
    run = {
        "tool": {"driver": {"name": "ckptkit", "version": __version__, "rules": [_rule(code) for code in codes]}},
        "invocations": [{"executionSuccessful": exit_code_of(document) != 2}],
        "columnKind": "unicodeCodePoints",
        "artifacts": _artifacts(document["files"]),
        "results": [_result(finding, codes) for finding in document["findings"]],
    }
    yield json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(code: str) -> dict[str, Any]:
    title, meaning, remedy = CODES[code]
    rule: dict[str, Any] = {"id": code, "shortDescription": {"text": title}, "fullDescription": {"text": meaning}}
    if remedy != "-":
        rule["help"] = {"text": remedy}
    return rule


def _artifacts(files: Sequence[CheckedFile]) -> list[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    for file in files:
        artifact: dict[str, Any] = {"location": {"uri": _uri(file["path"])}}
        if file["size"] is not None:
            artifact["length"] = file["size"]
        if file["sha256"] is not None:
            artifact["hashes"] = {"sha-256": file["sha256"]}
        known.setdefault(artifact["location"]["uri"], artifact)
    return list(known.values())


def _result(finding: CheckFindingDocument, codes: list[str]) -> dict[str, Any]:
    fix = f"; fix: {finding['fix']}" if finding["fix"] else ""
    same = "\0".join((finding["path"], finding["rule"], finding["code"]))
    return {
        "ruleId": finding["code"],
        "ruleIndex": codes.index(finding["code"]),
        "level": _LEVELS[finding["severity"]],
        "message": {"text": printable(finding["message"] + fix)},
        "locations": [
            {"physicalLocation": {"artifactLocation": {"uri": _uri(finding["path"])}, "region": {"startLine": 1}}}
        ],
        "partialFingerprints": {
            "ckptkit/v1": _digest(same),
        },
        "properties": {"rule": finding["rule"], "expected": finding["expected"], "found": finding["found"]},
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
