"""``--jobs`` and ``executor=``: shards and files that workers write, and what becomes of them when a worker dies."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import same_files
from support.killed import killed_after_one, killed_by_one, part_killed_always, part_killed_once
from support.range_server import range_server

import ckptkit
from ckptkit import conversion
from ckptkit.errors import CkptkitError, RewriteError
from ckptkit.fleet.shares import Share

GIVEN: dict[str, Any] = {"weights_only": True, "max_shard_size": 6000}


@pytest.fixture
def source(save: Callable[..., Path]) -> Path:
    torch.manual_seed(3)
    state = {f"layer{number}.weight": torch.randn(20, 20) for number in range(24)}
    state["tied.weight"] = state["layer5.weight"]
    return save({"model": state, "epoch": 3}, "source.pth")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    return tmp_path


class Failing(Executor):
    """Threads; of the tasks that are submitted some are lost, as with a worker."""

    def __init__(self, lost: Callable[[int], bool]) -> None:
        self._threads = ThreadPoolExecutor(2)
        self._lost = lost
        self.submitted = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        if not self._lost(self.submitted):
            return self._threads.submit(fn, *args, **kwargs)
        future: Future[Any] = Future()
        future.set_exception(BrokenExecutor("a worker is gone"))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait)


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_the_same_bytes_by_processes_of_our_own(folders: Path, source: Path, name: str) -> None:
    told: list[tuple[int, int]] = []
    given: dict[str, Any] = {**GIVEN, "dtype": "float16"}
    whole = ckptkit.convert(source, folders / "one" / name, **given)
    many = ckptkit.convert(source, folders / "many" / name, **given, jobs=2, progress=lambda *now: told.append(now))
    assert same_files(folders / "one", folders / "many")
    assert [f.to_dict() for f in many.findings] == [f.to_dict() for f in whole.findings]
    documents = [{**report.to_dict(), "destination": None} for report in (whole, many)]
    assert documents[0] == documents[1]
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("check", [True, False])
def test_the_same_bytes_by_an_executor(folders: Path, source: Path, threads: Executor, check: bool) -> None:
    ckptkit.convert(source, folders / "one/model.bin", **GIVEN, check=check)
    ckptkit.convert(source, folders / "many/model.bin", **GIVEN, check=check, executor=threads)
    assert same_files(folders / "one", folders / "many")
    before = {path: path.read_bytes() for path in (folders / "many").iterdir()}
    with pytest.raises(ckptkit.DestinationExistsError):
        ckptkit.convert(source, folders / "many/model.bin", **GIVEN, executor=threads)
    assert {path: path.read_bytes() for path in (folders / "many").iterdir()} == before
    fewer = {**GIVEN, "max_shard_size": 9000, "check": check, "force": True}
    ckptkit.convert(source, folders / "many/model.bin", **fewer, executor=threads)
    ckptkit.convert(source, folders / "one/model.bin", **fewer)
    assert same_files(folders / "one", folders / "many")


def test_the_same_bytes_by_dask(folders: Path, source: Path, dask_executor: Executor, runs: Path) -> None:
    ckptkit.convert(source, folders / "one/model.safetensors", **GIVEN)
    ckptkit.convert(source, folders / "many/model.safetensors", **GIVEN, executor=dask_executor)
    assert same_files(folders / "one", folders / "many")
    one = ckptkit.convert(runs, folders / "one", to="safetensors")
    many = ckptkit.convert(runs, folders / "many", to="safetensors", executor=dask_executor)
    assert trees(folders / "one") == trees(folders / "many")
    names = (str(folders / "one"), str(folders / "many"))
    assert untimed(json.loads(many.to_json())) == untimed(json.loads(one.to_json().replace(*names)))


def test_the_same_bytes_by_processes_of_somebody_elses(folders: Path, source: Path) -> None:
    ckptkit.convert(source, folders / "one/model.bin", **GIVEN)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        ckptkit.convert(source, folders / "many/model.bin", **GIVEN, executor=executor)
    assert same_files(folders / "one", folders / "many")


def test_urls_in_processes_of_our_own(folders: Path, source: Path) -> None:
    """Workers open the URLs themselves, a file's and a folder's."""
    with range_server(folders) as server:
        for name, jobs in (("one", 1), ("many", 2)):
            ckptkit.convert(f"{server.url}/source.pth", folders / name / "model.bin", **GIVEN, jobs=jobs)
    assert same_files(folders / "one", folders / "many")


def test_one_file_is_written_here(folders: Path, source: Path, threads: Executor) -> None:
    ckptkit.convert(source, folders / "one/model.pth")
    ckptkit.convert(source, folders / "many/model.pth", executor=threads)
    assert same_files(folders / "one", folders / "many")
    ckptkit.convert(source, folders / "one/model.safetensors", weights_only=True, max_shard_size="1GB")
    ckptkit.convert(source, folders / "many/model.safetensors", weights_only=True, max_shard_size="1GB", jobs=2)
    assert same_files(folders / "one", folders / "many")
    assert ckptkit.convert(source, folders / "new.bin", **GIVEN, jobs=2, dry_run=True).details["written"] is False


def test_a_lost_worker_costs_a_second_try(folders: Path, source: Path) -> None:
    ckptkit.convert(source, folders / "one/model.bin", **GIVEN)
    with Failing(lambda number: number in (1, 4)) as executor:
        ckptkit.convert(source, folders / "many/model.bin", **GIVEN, executor=executor)
    assert same_files(folders / "one", folders / "many")


def test_a_process_of_our_own_that_is_killed(folders: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its part is written again; where that is killed too, nothing stays behind."""
    monkeypatch.setattr(conversion, "write_part", part_killed_always)
    with pytest.raises(CkptkitError, match="SIGKILL"):
        ckptkit.convert(source, folders / "many/model.bin", **GIVEN, jobs=2)
    assert list((folders / "many").iterdir()) == []
    monkeypatch.setattr(conversion, "write_part", part_killed_once)
    ckptkit.convert(source, folders / "many/model.bin", **GIVEN, jobs=2)
    monkeypatch.undo()
    assert (folders / "killed").exists()
    ckptkit.convert(source, folders / "one/model.bin", **GIVEN)
    assert same_files(folders / "one", folders / "many")


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_driver_that_is_told_to_end(folders: Path, save: Callable[..., Path]) -> None:
    """It ends its workers, and nothing of what they wrote stays."""
    source = save({f"layer{number}": torch.full((1000, 1000), float(number)) for number in range(12)}, "large.pth")
    command = [sys.executable, "-m", "ckptkit", "convert", "-q", source, folders / "many/model.safetensors"]
    command += ["--max-shard-size", "5MB", "--dtype", "float64", "--jobs", "2"]
    env = {**os.environ, "PYTHONPATH": str(Path(ckptkit.__file__).parents[1])}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        while not list(folders.glob("many/.*/.model-*")) and process.poll() is None:  # a worker is at work
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, list((folders / "many").iterdir())) == (128 + signal.SIGTERM, []), errors


def test_all_or_nothing(folders: Path, source: Path) -> None:
    ckptkit.convert(source, folders / "many/model.bin", **GIVEN)
    before = {path: path.read_bytes() for path in (folders / "many").iterdir()}
    with Failing(lambda number: number > 3) as executor, pytest.raises(CkptkitError, match="a worker is gone"):
        ckptkit.convert(source, folders / "many/model.bin", **GIVEN, dtype="float16", executor=executor, force=True)
    assert {path: path.read_bytes() for path in (folders / "many").iterdir()} == before
    assert list((folders / "one").iterdir()) == []
    with Failing(lambda number: number > 3) as executor, pytest.raises(CkptkitError):
        ckptkit.convert(source, folders / "one/model.bin", **GIVEN, executor=executor)
    assert list((folders / "one").iterdir()) == []


def test_what_a_worker_raises_is_raised(folders: Path, source: Path, threads: Executor, monkeypatch: Any) -> None:
    from ckptkit.conversion import parts

    real = parts.write_part

    def changed(job: Any, options: Any, share: Share, task: Any) -> Any:
        if share.index == 2:
            os.utime(source, (1, 1))
        return real(job, options, share, task)

    monkeypatch.setattr(parts, "write_part", changed)
    with pytest.raises(CkptkitError, match="the file was changed while it was being"):
        ckptkit.convert(source, folders / "many/model.bin", **GIVEN, executor=threads)
    assert list((folders / "many").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        (None, {"rename": lambda name: name}, "--rename .* cannot be sent to other processes"),
        (None, {"map_location": lambda storage, tag: None}, "--map-location .* cannot be sent"),
        ("bytes", {}, "workers open the source by its path"),
        ("file", {}, "workers open the source by its path"),
    ],
)
def test_what_cannot_travel(folders: Path, source: Path, given: str | None, options: dict[str, Any], told: str) -> None:
    read: Any = source
    if given is not None:
        read = source.read_bytes() if given == "bytes" else io.BytesIO(source.read_bytes())
    with pytest.raises(RewriteError, match=told):
        ckptkit.convert(read, folders / "many/model.bin", **GIVEN, **options, jobs=2)
    assert list((folders / "many").iterdir()) == []


def test_what_can_travel(folders: Path, source: Path, threads: Executor) -> None:
    """A model to be like, a function of a module, a progress that stays here, paths that are relative."""
    like = ckptkit.Like({f"layer{number}.weight": (20, 20) for number in range(20)})
    given: dict[str, Any] = {"max_shard_size": 6000, "like": like, "rename": str.lower, "section": "model"}
    ckptkit.convert(source, folders / "one/model.bin", **given)
    told: list[int] = []
    before = os.getcwd()
    try:
        os.chdir(folders)
        ckptkit.convert(
            source.name, "many/model.bin", **given, executor=threads, progress=lambda done, of: told.append(done)
        )
    finally:
        os.chdir(before)
    assert same_files(folders / "one", folders / "many")
    assert len(told) > 2


# Folder to folder.


@pytest.fixture
def runs(save: Callable[..., Path], tmp_path: Path) -> Path:
    """Checkpoints in folders, one that is damaged, and other files."""
    for name in ("runs/a", "runs/b/c"):
        (tmp_path / name).mkdir(parents=True)
    for number, name in enumerate(("a/one", "a/two", "b/three", "b/c/four", "b/c/five", "six")):
        save({"module.w": torch.full((30, 30), float(number)), "module.b": torch.ones(3)}, f"runs/{name}.pth")
    (tmp_path / "runs/b/broken.pth").write_bytes((tmp_path / "runs/six.pth").read_bytes()[:700])
    (tmp_path / "runs/notes.txt").write_text("words")
    return tmp_path / "runs"


def untimed(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: untimed(value) for key, value in document.items() if key != "seconds"}
    return [untimed(each) for each in document] if isinstance(document, list) else document


def trees(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_documents_of_folders_are_the_same(convert, runs: Path, tmp_path: Path, threads: Executor) -> None:
    arguments = ["runs", "out", "--to", "safetensors", "--strip-module", "--json"]
    one = convert(*arguments, "--jobs", "1")
    files = trees(tmp_path / "out")
    assert (one.code, len(files)) == (2, 6)
    shutil.rmtree("out")
    many = convert(*arguments, "--jobs", "2")
    assert many.code == 2
    assert untimed(json.loads(many.out)) == untimed(json.loads(one.out))
    assert (trees(tmp_path / "out"), many.err) == (files, one.err)
    shutil.rmtree("out")
    report = ckptkit.convert("runs", "out", to="safetensors", strip_module=True, executor=threads)
    assert untimed(json.loads(report.to_json())) == untimed(json.loads(one.out))
    assert trees(tmp_path / "out") == files


def test_parts_of_a_folder_are_its_files_each_once(convert, runs: Path, tmp_path: Path) -> None:
    arguments = ("runs", "out", "--to", "safetensors", "--json")
    found: list[str] = []
    for number in range(1, 5):
        document = json.loads(convert(*arguments, "--part", f"{number}/4").out)
        found += [file["source"] for file in document["files"]]
    (tmp_path / "runs/b/broken.pth").unlink()
    whole = json.loads(convert("runs", "whole", *arguments[2:]).out)
    assert sorted(found) == sorted([*(file["source"] for file in whole["files"]), "runs/b/broken.pth"])
    assert trees(tmp_path / "out") == trees(tmp_path / "whole")
    again = convert(*arguments[:-1], "--part", "2/4")
    assert again.code == (2 if json.loads(convert(*arguments, "--part", "2/4", "--force").out)["files"] else 0)
    finished = convert(*arguments[:-1], "--finish")
    assert (finished.code, "the files of a folder are converted whole" in finished.err) == (2, True)


def test_shares_are_the_same_wherever_the_folder_lies(convert, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "elsewhere/copy")
    shares = []
    for folder in ("runs", str(tmp_path / "elsewhere/copy")):
        document = json.loads(convert(folder, "out", "--to", "safetensors", "--part", "1/2", "--json", "--dry-run").out)
        shares.append([os.path.relpath(file["source"], folder) for file in document["files"]])
    assert shares[0] == shares[1] != []


def test_clashes_between_parts(convert, save, runs: Path) -> None:
    save({"w": torch.ones(2)}, "runs/six.ckpt")
    for number in (1, 2):
        done = convert("runs", "out", "--to", "safetensors", "--part", f"{number}/2")
        assert (done.code, "1 output would be written from several files" in done.err) == (2, True)
    assert not os.path.exists("out")


def test_files_from_a_list(convert, runs: Path, tmp_path: Path) -> None:
    Path("list.txt").write_text("runs/six.pth\n\nruns/b/c/four.pth\r\nruns/gone.pth\nruns/six.pth\n")
    done = convert("runs", "out", "--to", "safetensors", "--files-from", "list.txt")
    assert (done.code, "runs/gone.pth: no such file" in done.err) == (2, True)
    assert sorted(trees(tmp_path / "out")) == ["b/c/four.safetensors", "six.safetensors"]
    for text, told in (
        ("source.pth\n", "source.pth is not below runs"),
        ("\n", "lists no file to convert"),
    ):
        Path("list.txt").write_text(text)
        refused = convert("runs", "new", "--to", "safetensors", "--files-from", "list.txt")
        assert (refused.code, told in refused.err) == (2, True), refused.err
    refused = convert("runs", "new", "--to", "safetensors", "--files-from", "none.txt")
    assert (refused.code, "no such file" in refused.err) == (2, True)
    assert not os.path.exists("new")


def test_a_file_that_kills_its_worker(runs: Path, tmp_path: Path) -> None:
    from ckptkit.conversion.folder import convert_folder
    from ckptkit.options import ConvertOptions

    options = ConvertOptions(to="safetensors", jobs=2)
    report = convert_folder(str(runs), str(tmp_path / "out"), options, killed_by_one)
    failed = [file for file in report.details["files"] if file["error"] is not None]
    assert [os.path.basename(file["source"]) for file in failed] == ["broken.pth", "three.pth"]
    assert [finding.severity for finding in report.findings] == ["error", "error"]
    assert "SIGKILL" in failed[1]["error"]["message"]
    assert sorted(trees(tmp_path / "out")) == [
        "a/one.safetensors", "a/two.safetensors", "b/c/five.safetensors", "b/c/four.safetensors", "six.safetensors",
    ]  # fmt: skip


def test_a_file_that_was_converted_before_its_worker_died(runs: Path, tmp_path: Path) -> None:
    """It is not taken for an output of others; one that others wrote meanwhile is."""
    from ckptkit.conversion.folder import convert_folder
    from ckptkit.options import ConvertOptions

    (tmp_path / "out/b/c").mkdir(parents=True)
    options = ConvertOptions(to="safetensors", jobs=2)
    report = convert_folder(str(runs), str(tmp_path / "out"), options, killed_after_one)
    assert (runs / "a/two.pth.killed").exists()
    files = {os.path.basename(file["source"]): file for file in report.details["files"]}
    assert [name for name, file in files.items() if file["error"] is not None] == ["broken.pth", "four.pth"]
    assert files["four.pth"]["error"]["type"] == "DestinationExistsError"
    assert (tmp_path / "out/b/c/four.safetensors").read_bytes() == b"of others"
    assert files["two.pth"]["destination"] == str(tmp_path / "out/a/two.safetensors")
    assert len(trees(tmp_path / "out")) == 6
