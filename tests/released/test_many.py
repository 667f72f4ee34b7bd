"""Check and manifest of many files, on whatever does the work: the same report, and a result for each file."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import odd_files

import ckptkit
from ckptkit.codes import CODES
from ckptkit.errors import CkptkitError, VerifyError
from ckptkit.released import file_check
from ckptkit.released.results import CheckReport
from ckptkit.transfer import many

CODES_OF = {"dies": "worker-died", "hangs": "timed-out", "memory": "worker-failed", "denied": "file-unreadable"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder ``w`` of 24 checkpoints, some of which fail, and what is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w" / "sub").mkdir(parents=True)
    for number in range(20):
        state = {"a": torch.full((3,), float(number)), "b": torch.ones(2)}
        below = "sub/" * (number % 3 == 0)
        if number % 2:
            save_file(state, f"w/{below}m{number}.safetensors")
        else:
            torch.save(state, f"w/{below}m{number}.pth")
    Path("w/broken.pth").write_bytes(b"PK\x03\x04 and no more")
    Path("w/empty.safetensors").write_bytes(b"")
    torch.save({"a": torch.tensor([1.0, torch.nan])}, "w/nan.pth")
    torch.save([print], "w/hostile.pth")
    Path("w/notes.txt").write_text("none of them")
    return tmp_path


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    """Two processes that know of odd files."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=odd_files.are_odd) as pool:
        pool.submit(odd_files.are_odd).result()
        yield pool


@pytest.fixture(params=["threads", "processes", "dask"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "threads":
        with ThreadPoolExecutor(3) as pool:
            yield pool
    else:
        yield request.getfixturevalue({"processes": "processes", "dask": "dask_executor"}[request.param])


def told(report: CheckReport) -> dict[str, Any]:
    return {**report.to_dict(), "seconds": None}


@pytest.mark.parametrize("options", [{}, {"no_nan": True, "no_pickle": True}])
def test_the_report_does_not_depend_on_who_does_the_work(
    options: dict[str, Any], folder: Path, executor: Executor
) -> None:
    alone = ckptkit.check(["w"], **options)
    assert told(ckptkit.check(["w"], executor=executor, **options)) == told(alone)
    assert (alone.exit_code, len(alone.results)) == (2, 24)


def test_nor_on_the_number_of_processes(folder: Path) -> None:
    one, two = (ckptkit.check(["w"], max_trust="safe", jobs=jobs) for jobs in (1, 2))
    assert told(one) == told(two)
    assert told(ckptkit.check(["w"], max_trust="safe", timeout=30)) == told(one)
    first, second = (ckptkit.manifest(["w/sub"], jobs=jobs) for jobs in (1, 2))
    assert first.to_json() == second.to_json()


def test_held_against_a_manifest(folder: Path, executor: Executor) -> None:
    ckptkit.manifest(["w/sub"], "lock.json", executor=executor)
    assert Path("lock.json").read_text() == ckptkit.manifest(["w/sub"], "again.json").to_json()
    Path("again.json").unlink()
    assert ckptkit.check(manifest="lock.json", executor=executor).exit_code == 0
    torch.save({"a": torch.ones(3)}, "w/sub/m0.pth")
    Path("w/sub/m12.pth").unlink()
    codes = [finding.code for finding in ckptkit.check(manifest="lock.json", executor=executor).findings]
    assert codes == [finding.code for finding in ckptkit.check(manifest="lock.json").findings]
    assert {"file-missing", "tensors-missing"} & {*codes}
    changes = ckptkit.manifest(destination="lock.json", update=True, executor=executor).changes
    assert (changes.changed, changes.removed, len(changes.kept)) == (("w/sub/m0.pth",), ("w/sub/m12.pth",), 5)


def test_a_manifest_tells_of_each_file_that_cannot_be_recorded(folder: Path, processes: Executor) -> None:
    for asked in ({"jobs": 1}, {"executor": processes}):
        with pytest.raises(CkptkitError, match=r"2 files cannot be recorded:\n.*broken.pth.*\n.*empty.safetensors"):
            ckptkit.manifest(["w"], **asked)
    torch.save({"a": torch.ones(1)}, "w/sub/memory.pth")
    with pytest.raises(CkptkitError, match=r"w/sub/memory.pth: out of memory"):
        ckptkit.manifest(["w/sub"], executor=processes)


def test_each_failure_is_the_result_of_its_file(folder: Path, processes: Executor) -> None:
    names = ["memory", "denied", "m0"]
    for name in names[:2]:
        torch.save({"a": torch.ones(1)}, f"w/sub/{name}.pth")
    report = ckptkit.check([f"w/sub/{name}.pth" for name in names], executor=processes)
    codes = {result.path: [finding.code for finding in result.findings] for result in report.results}
    assert codes == {"w/sub/denied.pth": ["file-unreadable"], "w/sub/m0.pth": [], "w/sub/memory.pth": ["worker-failed"]}
    assert report.exit_code == 2 and report.findings[1].message == "out of memory"


def test_a_worker_that_dies_and_a_file_that_hangs(folder: Path, forks: Any) -> None:
    """Of processes of our own: what ends one is not the end of the others, and what hangs is ended."""
    for name in CODES_OF:
        torch.save({"a": torch.ones(1)}, f"w/sub/{name}.pth")
    code = """
import sys
sys.path.insert(0, {tests!r})
from support import odd_files
odd_files.are_odd()  # which forks inherit
from ckptkit.cli import main
main(["check", "w/sub", "--jobs", "2", "--timeout", "1"])
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    code = code.format(tests=str(Path(__file__).parents[1]))
    done = forks(with_torch=False).run("-c", code, cwd=folder, env=env)
    lines = done.stdout.splitlines()
    assert done.returncode == 2, done.stderr
    for name, expected in CODES_OF.items():
        place = lines.index(f"w/sub/{name}.pth: NOT CHECKED")
        assert lines[place + 1].endswith(f"[{expected}]")
    assert lines[-1] == "4 of 11 files could not be checked, 7 passed"
    assert [line for line in lines if ": ok" in line] == sorted(line for line in lines if ": ok" in line)


def test_an_executor_that_is_broken_is_never_green(folder: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pass
    report = ckptkit.check(["w/sub"], executor=pool)
    assert report.exit_code == 2 and not report.ok
    assert {finding.code for finding in report.findings} <= {"worker-died", "worker-failed"}
    assert len(report.results) == len({finding.path for finding in report.findings}) == 7


def test_a_worker_of_another_version(folder: Path, monkeypatch: pytest.MonkeyPatch, processes: Executor) -> None:
    from ckptkit.fleet import driver

    monkeypatch.setattr(driver, "__version__", "9.9.9")
    report = ckptkit.check(["w/sub"], executor=processes)
    assert {finding.code for finding in report.findings} == {"worker-version"}
    assert report.exit_code == 2 and "9.9.9" in report.findings[0].message


def test_what_others_could_not_do_is_explained() -> None:
    from ckptkit.released.results import NOT_CHECKED, lost_result

    for problem in ("died", "timed-out", "version", "failed"):
        result = lost_result("a.pth", problem, "why")
        (finding,) = result.findings
        assert finding.code in CODES and finding.code in NOT_CHECKED
        assert (result.ok, result.is_checked, finding.message) == (False, False, "why")


@pytest.mark.parametrize(
    "wrong",
    [{"jobs": 0}, {"jobs": -1}, {"jobs": "2"}, {"jobs": True}, {"timeout": 0}, {"timeout": -3.0}, {"executor": 3}],
)
def test_workers_that_cannot_be(wrong: dict[str, Any], folder: Path) -> None:
    with pytest.raises(CkptkitError):
        ckptkit.check(["w"], **wrong)
    with ThreadPoolExecutor(1) as pool, pytest.raises(CkptkitError, match="either jobs or an executor"):
        ckptkit.check(["w"], jobs=2, executor=pool)


def test_parts_together_are_the_whole(folder: Path) -> None:
    Path("w/data.npy").write_bytes(b"\x93NUMPY" + bytes(80))
    whole = ckptkit.check(["w"], no_pickle=True)
    for count in (1, 3, 40):
        parts = [ckptkit.check(["w"], no_pickle=True, part=f"{index}/{count}") for index in range(1, count + 1)]
        results = [result.to_dict() for part in parts for result in part.results]
        assert sorted(results, key=lambda each: each["path"]) == [result.to_dict() for result in whole.results]
        assert sum(part.to_dict()["checked"] for part in parts) == whole.to_dict()["checked"]
        kinds = {kind: sum(part.passed_over.get(kind, 0) for part in parts) for kind in whole.passed_over}
        assert kinds == whole.passed_over
        empty = [part for part in parts if not part.results]
        assert all(part.exit_code == 0 and part.verdict.endswith(" has no files") for part in empty)
        assert bool(empty) == (count == 40)
    with pytest.raises(VerifyError, match="expected I/N"):
        ckptkit.check(["w"], part="3/2")


def test_parts_of_what_is_not_there(folder: Path) -> None:
    (folder / "none").mkdir()
    codes = [ckptkit.check(["none", "nope.pth"], part=f"{index}/2").exit_code for index in (1, 2)]
    assert 2 in codes
    ckptkit.manifest(["w/sub"], "lock.json")
    Path("w/sub/m0.pth").unlink()
    found = [
        finding.code
        for index in (1, 2, 3)
        for finding in ckptkit.check(manifest="lock.json", part=f"{index}/3").findings
    ]
    assert found == ["file-missing"]


def test_a_few_files_stay_in_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do all of one job; very many do not, where there are cores for them."""
    seen: list[Any] = []
    monkeypatch.setattr("ckptkit.fleet.each", lambda tasks, *_, **__: seen.extend(tasks) or iter(()))
    assert len(ckptkit.check(["w"]).results) == 24 and len(ckptkit.check(["w"], jobs=1).results) == 24
    assert seen == []
    monkeypatch.setattr("ckptkit.fleet.cores", lambda: 2)
    workers = many.Workers()
    assert [workers.are_others(count) for count in (1, 249, 250)] == [False, False, True]
    monkeypatch.setattr("ckptkit.fleet.cores", lambda: 1)
    assert not workers.are_others(1000)


def test_results_come_while_others_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptkit import api
    from ckptkit.released import Run

    looked_at = []
    examine = file_check.examine_file
    monkeypatch.setattr(
        file_check, "examine_file", lambda path, **asked: looked_at.append(path) or examine(path, **asked)
    )
    run = Run(["w"], manifest=None, config=None, skip_others=False, typed={}, verify=api.verify)
    results = run.results()
    first = next(results)
    assert looked_at == [first.path]
    assert [first.path, *(result.path for result in results)] == sorted(looked_at)
