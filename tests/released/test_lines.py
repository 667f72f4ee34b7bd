"""Results as JSON Lines: what another run takes over, and several runs as one report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.commands import output_of
from support.far import serving

import ckptkit
from ckptkit import api
from ckptkit.cli.check import command as check_command
from ckptkit.cli.report import command as report_command
from ckptkit.codes import CODES
from ckptkit.errors import FormatError, MissingFileError, VerifyError
from ckptkit.released import file_check, lines
from ckptkit.released.document import CheckEnd, CheckHead, CheckLine
from ckptkit.released.merging import merged


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with checkpoints in ``w``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    for number in range(4):
        torch.save({"a": torch.full((3,), float(number))}, f"w/{number}.pth")
    save_file({"a": torch.ones(2)}, "w/s.safetensors")
    return tmp_path


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were looked at."""
    seen: list[str] = []
    examine = file_check.examine_file
    monkeypatch.setattr(file_check, "examine_file", lambda path, **asked: seen.append(path) or examine(path, **asked))
    return seen


def check(*arguments: str, to: str | None = None, code: int = 0) -> list[dict[str, Any]]:
    """The lines of a run, which are appended to a file."""
    text = output_of(check_command, *arguments, "--json-lines", code=code)
    if to is not None:
        with Path(to).open("a") as file:
            file.write(text)
    return [json.loads(line) for line in text.splitlines()]


def report(*files: str, code: int = 0) -> dict[str, Any]:
    return json.loads(output_of(report_command, *files, "--json", code=code))


def codes(document: dict[str, Any]) -> list[str]:
    found = [finding["code"] for finding in document["findings"]]
    assert {*found} <= {*CODES}
    return found


def touched(path: str) -> None:
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def test_a_run_has_a_first_line_one_a_file_and_a_last() -> None:
    Path("w/broken.pth").write_bytes(b"PK\x03\x04")
    head, *results, end = check("w", code=2)
    assert head.keys() == CheckHead.__required_keys__
    assert (head["schema_version"], head["ckptkit"], head["part"]) == (1, ckptkit.__version__, None)
    assert all(line.keys() == CheckLine.__required_keys__ for line in results)
    assert [line["path"] for line in results] == sorted(str(path) for path in Path("w").iterdir())
    document = ckptkit.check(["w"]).to_dict()
    assert [{key: line[key] for key in document["files"][0]} for line in results] == document["files"]
    assert [finding for line in results for finding in line["findings"]] == document["findings"]
    assert end.keys() == CheckEnd.__required_keys__
    assert (end["ok"], end["exit_code"], end["results"], end["checked"]) == (False, 2, 6, 5)
    assert end["verdict"] == "1 of 6 files could not be checked, 5 passed"


def test_what_is_unchanged_is_not_looked_at_again(looked_at: list[str]) -> None:
    first = check("w", to="runs")
    looked_at.clear()
    touched("w/2.pth")
    again = check("w", "--resume", "runs", to="runs")
    assert looked_at == ["w/2.pth"]
    assert again[0]["run"] == first[0]["run"]
    assert [{**line, "seconds": 0, "stamp": ""} for line in again[1:-1]] == [
        {**line, "seconds": 0, "stamp": ""} for line in first[1:-1]
    ]
    assert again[-1] == first[-1]
    looked_at.clear()
    check("w", "--resume", "runs", to="runs")
    assert looked_at == [], "the latest line about each file counts"
    document = report("runs")
    assert (document["checked"], codes(document)) == (5, [])


def test_another_size_time_policy_version_or_record_is_looked_at(
    looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*arguments: str, code: int = 0) -> list[str]:
        looked_at.clear()
        check("w", *arguments, "--resume", "runs", to="runs", code=code)
        return [*dict.fromkeys(looked_at)]

    everything = sorted(str(path) for path in Path("w").iterdir())
    check("w", to="runs")
    status = os.stat("w/1.pth")
    with Path("w/1.pth").open("ab") as file:
        file.write(b"\0")
    os.utime("w/1.pth", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert again(code=2) == ["w/1.pth"], "of another size, though not of another time"
    torch.save({"a": torch.ones(3)}, "w/1.pth")
    assert again() == ["w/1.pth"]
    assert again("--no-nan") == everything
    assert again("--max-size", "1GB", "--no-nan") == everything
    assert again("--no-nan") == everything, "the latest line about each file is one of another policy"
    Path("ckptkit.toml").write_text("no-nan = true\n[[overrides]]\nfiles = ['*.safetensors']\nmax-size = 5000\n")
    assert again("--config", "ckptkit.toml") == ["w/s.safetensors"], "the others are held to the same"
    ckptkit.manifest(["w"], "lock.json")
    manifest = ("--config", "ckptkit.toml", "--manifest", "lock.json")
    assert again(*manifest) == everything
    document = json.loads(Path("lock.json").read_text())
    document["files"][0]["kind"] = "other"
    Path("lock.json").write_text(json.dumps(document))
    assert again(*manifest, code=1) == ["w/0.pth"]
    monkeypatch.setattr("ckptkit.released.__version__", "9.9.9")
    assert again(*manifest, code=1) == everything
    assert again(*manifest, code=1) == []


def test_another_file_of_the_same_size_and_time_is_looked_at(looked_at: list[str]) -> None:
    """As ``cp -p``, rsync and archives put one there."""
    check("w", to="runs")
    looked_at.clear()
    there, other = Path("w/0.pth"), Path("other")
    other.write_bytes(there.read_bytes())
    os.utime(other, ns=(there.stat().st_atime_ns, there.stat().st_mtime_ns))
    other.replace(there)
    check("w", "--resume", "runs", to="runs")
    assert looked_at == ["w/0.pth"]


def test_a_reading_that_failed_is_tried_again(looked_at: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file is stays; what a disk or a worker did may not."""
    Path("w/broken.pth").write_bytes(b"PK\x03\x04")
    first = check("w", "nope.pth", to="runs", code=2)
    stamps = {line["path"]: line["stamp"] for line in first[1:-1]}
    assert stamps["w/broken.pth"] is not None and stamps["nope.pth"] is None
    looked_at.clear()
    check("w", "nope.pth", "--resume", "runs", code=2)
    assert looked_at == ["nope.pth"]


def test_a_shard_that_changes_changes_its_checkpoint(looked_at: list[str]) -> None:
    state = {"a": torch.ones(300), "b": torch.ones(300)}
    ckptkit.save(state, "w/big.safetensors", max_shard_size=1300)
    check("w", to="runs")
    looked_at.clear()
    shard = next(str(path) for path in sorted(Path("w").glob("big-*")))
    touched(shard)
    check("w", "--resume", "runs", to="runs")
    assert looked_at == ["w/big.safetensors.index.json"]


def test_a_folder_that_is_a_checkpoint_and_an_archive_member(looked_at: list[str]) -> None:
    import shutil

    with ckptkit.open("w/0.pth") as file:
        file.save("dcp", to="dcp")
    shutil.make_archive("packed", "zip", "w")
    check("dcp", "packed.zip/1.pth", to="runs")
    looked_at.clear()
    check("dcp", "packed.zip/1.pth", "--resume", "runs", to="runs")
    assert looked_at == []
    touched(next(str(path) for path in Path("dcp").glob("*.distcp")))
    touched("packed.zip")
    check("dcp", "packed.zip/1.pth", "--resume", "runs", to="runs")
    assert looked_at == ["dcp", "packed.zip/1.pth"]


def test_files_at_urls_by_what_their_server_says_of_them(looked_at: list[str]) -> None:
    data = Path("w/0.pth").read_bytes()
    urls = ["far://bucket/a.pth", "far://bucket/b.pth"]
    with serving(dict.fromkeys(urls, data)) as store:
        check(*urls, to="runs")
        requests = len(store.asked)
        check("far://bucket/", to="folder")
        looked_at.clear()
        check(*urls, "--resume", "runs")
        check("far://bucket/", "--resume", "folder")
        assert looked_at == []
        store.files[urls[1]] = Path("w/1.pth").read_bytes()
        check(*urls, "--resume", "runs", to="runs")
        assert looked_at == urls[1:]
        store.asked.clear()
        output_of(check_command, *(url.replace("bucket", "other") for url in urls), code=2)
        output_of(check_command, *urls)
        assert requests <= len([each for each in store.asked if "bucket" in each.url]) + 2


@pytest.mark.parametrize("cut", [1, 30, 400, 900])
def test_a_torn_line_is_no_error_and_never_green(cut: int, looked_at: list[str]) -> None:
    check("w", to="runs")
    data = Path("runs").read_bytes()
    Path("runs").write_bytes(data[:-cut])
    if cut > 1:
        assert codes(report("runs", code=2)) == ["results-incomplete"]
    looked_at.clear()
    with Path("runs").open("a") as file:
        file.write("\n")  # as a run that appends to a file begins
    check("w", "--resume", "runs", to="runs")
    assert len(looked_at) == (0 if cut < 400 else 1 if cut < 600 else 3 if cut > 800 else 2)
    assert codes(report("runs")) == []


def test_a_line_that_is_lost_is_told() -> None:
    check("w", to="runs")
    kept = Path("runs").read_text().splitlines()
    for lost in (2, len(kept) - 1):
        Path("cut").write_text("\n".join(kept[:lost] + kept[lost + 1 :]) + "\n")
        document = report("cut", code=2)
        assert codes(document) == ["results-incomplete"] and document["findings"][0]["path"] == "cut"
    edited = kept[2].replace('"ok": true', '"ok": false')
    Path("cut").write_text("\n".join([*kept[:2], edited, *kept[3:]]))
    assert codes(report("cut", code=2)) == ["results-incomplete"]


def test_parts_are_one_report() -> None:
    torch.save({"a": torch.tensor([torch.nan])}, "w/nan.pth")
    Path("w/notes.txt").write_text("none")
    for index in (1, 2, 3):
        output_of(
            check_command, "w", "--no-nan", "--part", f"{index}/3", "--json-lines", code=None, to=f"{index}.jsonl"
        )
    whole = ckptkit.check(["w"], no_nan=True).to_dict()
    assert report("1.jsonl", "2.jsonl", "3.jsonl", code=1) == {**whole, "config": None}
    document = report("3.jsonl", "1.jsonl", code=2)
    assert "part-missing" in codes(document)
    missing = next(finding for finding in document["findings"] if finding["code"] == "part-missing")
    assert missing["message"] == "no run has reported on 1 part of 3: 2/3"


def test_documents_are_runs_too() -> None:
    whole = output_of(check_command, "w", "--json", to="whole.json")
    assert report("whole.json") == json.loads(whole)
    Path("pretty.json").write_text(json.dumps(json.loads(whole), indent=2))
    assert report("pretty.json") == json.loads(whole)
    for index in (1, 2):
        output_of(check_command, "w", "--json", "--part", f"{index}/2", to=f"{index}.json")
    assert report("1.json", "2.json")["checked"] == 5
    assert codes(report("2.json", code=2)) == ["part-missing"]
    Path("failed.json").write_text('{"schema_version": 1, "ok": false, "error": {"type": "X", "message": "m"}}\n')
    assert codes(report("whole.json", "failed.json", code=2)) == ["results-incomplete"]


def test_of_several_runs_the_worst_counts_and_of_one_the_latest() -> None:
    check("w", to="a")
    Path("w/1.pth").write_bytes(b"PK\x03\x04")
    check("w", to="b", code=2)
    assert codes(report("a", "b", code=2)) == codes(report("b", "a", code=2)) == ["file-unreadable"]
    torch.save({"a": torch.ones(3)}, "w/1.pth")
    check("w", "--resume", "b", to="c")
    assert codes(report("b", "c")) == codes(report("c", "b", "b")) == []
    assert codes(report("a", "b", "c")) == []
    check("w", to="b")
    assert codes(report("b", code=2)) == ["file-unreadable"], "appended, and not resumed: two runs"


def test_other_versions_and_policies_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    check("w", to="a")
    check("w", "--no-nan", to="b")
    (differs,) = report("a", "b", code=2)["findings"]
    assert (differs["code"], differs["path"]) == ("results-differ", "b")
    monkeypatch.setattr("ckptkit.released.__version__", "9.9.9")
    check("w", to="c")
    (differs,) = report("a", "c", code=2)["findings"]
    assert (differs["expected"], differs["found"]) == (f"the same version of ckptkit: {ckptkit.__version__}", "9.9.9")


def test_nothing_is_never_green() -> None:
    Path("list").write_text("w/0.pth\n")
    for index in (1, 2, 3):
        check("--files-from", "list", "--part", f"{index}/3", to=f"{index}")
    assert report("1", "2", "3")["checked"] == 1
    empty = [file for file in "123" if len(Path(file).read_text().splitlines()) == 2]
    assert len(empty) == 2
    for file, number in zip(empty, "12", strict=True):
        text = Path(file).read_text().replace('/3"', '/2"').replace(f'"{file}/2"', f'"{number}/2"')
        Path(f"e{number}").write_text(text)
    assert codes(report("e1", "e2", code=2)) == ["nothing-selected"]
    Path("nothing").write_text("")
    assert check("--files-from", "nothing", "--skip-others", to="s")[-1]["may_be_empty"]
    assert report("s")["files"] == []
    with pytest.raises(VerifyError, match="nothing to report on"):
        merged([])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04\n\n\xff",
        b"{}\n",
        b"[1]\n",
        b'{"path": "a"}\n',
        b'{"schema_version": 1, "files": 3, "findings": []}',
    ],
)
def test_what_is_no_run(data: bytes) -> None:
    Path("other").write_bytes(data)
    with pytest.raises(FormatError, match="other: "):
        merged(["other"])
    if data:
        with pytest.raises(FormatError, match="contains no results that a check can resume from"):
            check("w", "--resume", "other")
    for ask in (lambda: merged(["nope"]), lambda: check("w", "--resume", "nope")):
        with pytest.raises(MissingFileError, match="nope: no such file"):
            ask()


def test_a_run_of_a_later_schema() -> None:
    check("w", to="runs")
    Path("runs").write_text(Path("runs").read_text().replace('{"schema_version": 1', '{"schema_version": 2', 1))
    with pytest.raises(FormatError, match="was written by a version of ckptkit that this one does not understand"):
        merged(["runs"])


def test_models_are_part_of_what_a_result_depends_on(looked_at: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = lines.Policy(fits="net.py:build")
    before = lines.digest_of_policy(policy)
    Path("net.py").write_text("def build(): ...\n")
    with_file = lines.digest_of_policy(policy)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    assert len({before, with_file, lines.digest_of_policy(policy)}) == 3
    assert api.check is ckptkit.check
