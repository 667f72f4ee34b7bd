"""A check's report as SARIF 2.1.0, for GitHub's code scanning and whatever else reads it.

The format is that of OASIS (https://docs.oasis-open.org/sarif/sarif/v2.1.0/).  The codes found are the rules, with the
texts of ``ckptkit explain``; rule, expected and found stand under each result's ``properties``.  GitHub shows no result
without a line, so each has the first, which says no more than "this file".
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any
from urllib.parse import quote

from ckptkit.codes import CODES
from ckptkit.released.results import CheckFinding, CheckReport, FileResult
from ckptkit.report import printable
from ckptkit.version import __version__

__all__ = ["render"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def render(report: CheckReport) -> str:
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
