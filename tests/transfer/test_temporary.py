"""Temporary files: how they are called and locked, what the next run removes, and whose permissions they get."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from support.plans import (
    ASKED,
    INDEX,
    SHARD_SIZES,
    files_of,
    held,
    only,
    plan_of,
    posix_only,
    some_plan,
    some_result,
    write,
)

import ckptkit
from ckptkit.bytesource import SourceFile
from ckptkit.places import is_temporary_name
from ckptkit.plan import LiteralBytes
from ckptkit.transfer import names
from ckptkit.transfer.folders import OutputFolder, created_folder
from ckptkit.transfer.names import Output, created, remove_stale

pytestmark = posix_only

PLAN = plan_of(LiteralBytes(0, b"new"))


def left(path: Path) -> str:
    """What a run leaves that is killed: its name."""
    output = created(PLAN, str(path), path.name)
    os.close(output.fd)
    return os.path.basename(output.temporary)


def opened_file(out: Path) -> SourceFile:
    out.write_bytes(b"data")
    file = SourceFile(out)
    file.read(0, 1)
    return file


@pytest.mark.parametrize(
    "made", [opened_file, lambda out: created(PLAN, str(out), "out"), lambda out: created_folder(str(out), "out")]
)
def test_what_is_interrupted_as_it_closes_is_not_closed_twice(
    made: Callable[[Path], SourceFile | Output | OutputFolder], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, close = made(out), os.close

    def interrupted(fd: int) -> None:
        close(fd)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "close", interrupted)
        file.close()
    file.close()
    assert set(only(out)) <= {out.name}


# Names.


@pytest.mark.parametrize(
    "name",
    ["a", "a.pth", "a.b.safetensors", "model.safetensors.index.json", ".hidden", "\U00010348" * 63 + ".pt", "x" * 255],
)
def test_a_temporary_name_is_known(out: Path, name: str) -> None:
    output = created(PLAN, str(out.parent / name), name)
    temporary = os.path.basename(output.temporary)
    assert only(out) == [temporary]
    assert is_temporary_name(temporary)
    assert temporary.endswith(os.path.splitext(name)[1][:16])
    output.close()
    assert only(out) == []


@pytest.mark.parametrize(
    "name",
    ["a.pth", ".a.pth", ".a.tmp", ".a.12345678.pth", "a.12345678.tmp.pth", ".a.1234567g.tmp", ".d/a.12345678.tmp"],
)
def test_other_names_are_not(name: str) -> None:
    assert not is_temporary_name(name)
    assert is_temporary_name(".a.12345678.tmp")  # of earlier versions, and where there are no locks
    assert is_temporary_name(".a.1234567890abcdef.tmp.pth")


# What is removed.


def test_what_a_killed_run_left_is_removed(source: SourceFile, out: Path) -> None:
    names_left = {left(out), left(out.with_name("other.pth")), left(out.with_name("a"))}
    assert set(only(out)) == names_left
    write(out, some_plan(source))
    assert only(out) == [out.name]
    assert out.read_bytes() == some_result()


def test_what_is_not_ours_to_remove(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = out.parent
    output = created(PLAN, str(out), out.name)  # at work
    monkeypatch.setattr(names, "_host_digits", lambda: "0badcafe")
    elsewhere = left(out)
    monkeypatch.undo()
    named, linked = left(folder / "model-00001-of-00002.pth"), left(out)
    (folder / "any name.json").write_text(f'{{"weight_map": {{"w": "{named}"}}}}')
    (folder / linked).unlink()
    (folder / linked).symlink_to(out)
    fifo = left(out)
    (folder / fifo).unlink()
    os.mkfifo(folder / fifo)
    for name in ("folder.json", left(out) + "folder"):
        (folder / name).mkdir(exist_ok=True)
    os.mkfifo(folder / "fifo.json")
    others = [elsewhere, ".result.12345678.tmp.bin", ".result.tmp", "result.1234567890abcdef.tmp"]
    for name in others:
        (folder / name).touch()
    stale = left(out)
    before = set(os.listdir(folder))
    remove_stale(str(folder))
    gone = before - set(os.listdir(folder))
    assert stale in gone
    assert all(is_temporary_name(name) and name not in others for name in gone)
    assert not gone & {os.path.basename(output.temporary), named, linked, fifo}
    output.close()


def test_many_that_a_killed_run_left(out: Path) -> None:
    """More than may be open at a time, as of a run that wrote thousands of shards."""
    for _ in range(700):
        left(out)
    remove_stale(str(out.parent))
    assert only(out) == []


@pytest.mark.parametrize("is_named", [True, False])
def test_a_shard_that_was_left_under_two_names(out: Path, is_named: bool) -> None:
    """As of a run that was killed between the two: the one that an index names stays, whichever is met first."""
    folder = out.parent
    for _ in range(8):
        first = left(out)
        second = f"{first[:8]}{'0' * 8}{first[16:]}"
        os.link(folder / first, folder / second)
        (folder / "m.json").write_text(f'{{"weight_map": {{"w": "{first}"}}}}' if is_named else "{}")
        remove_stale(str(folder))
        assert set(only(out)) - {"m.json"} == ({first} if is_named else set())
        for name in (first, "m.json"):
            (folder / name).unlink(missing_ok=True)


def test_an_index_that_cannot_be_read_names_anything(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = left(out)
    (out.parent / "index.json").write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(names, "SourceFile", lambda path: (_ for _ in ()).throw(PermissionError(path)))
        remove_stale(str(out.parent))
    assert stale in only(out)
    remove_stale(str(out.parent))
    assert only(out) == ["index.json"]


@pytest.mark.parametrize("way", ["locked by the other", "removed by the other"])
def test_a_file_that_is_swept_before_it_is_locked(out: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    real, seen = names.locked, list[int]()

    def late(fd: int) -> bool:
        seen.append(fd)
        if len(seen) == 1:
            for path in out.parent.iterdir():
                path.unlink()
            return way != "locked by the other"
        return real(fd)

    monkeypatch.setattr(names, "locked", late)
    write(out, PLAN)
    assert len(seen) == 2
    assert out.read_bytes() == b"new"
    assert only(out) == [out.name]


def test_where_there_are_no_locks(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    stale = left(out)
    monkeypatch.setattr(fcntl, "flock", none)
    output = created(PLAN, str(out), out.name)
    assert not output.host
    monkeypatch.undo()
    remove_stale(str(out.parent))
    assert only(out) == [os.path.basename(output.temporary)]
    assert stale not in only(out)
    output.close()
    monkeypatch.setattr(names, "fcntl", None)
    write(out, PLAN)
    assert only(out) == [out.name]


def test_runs_that_sweep_while_others_begin(out: Path) -> None:
    done = threading.Event()

    def sweeping() -> None:
        while not done.is_set():
            remove_stale(str(out.parent))

    def writing(number: int) -> bytes:
        path = out.with_name(f"{number}.bin")
        write(path, plan_of(LiteralBytes(0, str(number).encode())), check=None)
        return path.read_bytes()

    sweepers = [threading.Thread(target=sweeping) for _ in range(2)]
    for thread in sweepers:
        thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(writing, range(100))) == [str(number).encode() for number in range(100)]
    finally:
        done.set()
        for thread in sweepers:
            thread.join()
    assert len(only(out)) == 100


# Permissions.


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o444, 0o755, 0o666])
def test_what_is_replaced_keeps_its_mode(sources: dict[str, Path], out: Path, kept: int) -> None:
    path = out.with_name(ASKED)
    path.write_bytes(b"old")
    path.chmod(kept)
    ckptkit.convert(sources["new"], path, force=True)
    assert (mode(path), held(out.parent)) == (kept, "new")
    # Shards and their index, where there were none before: the one file was for some eyes alone.
    ckptkit.convert(sources["old"], path, force=True, max_shard_size=SHARD_SIZES[3])
    assert only(out) == files_of(3)
    assert {mode(out.with_name(name)) for name in only(out)} == {kept}
    # Each keeps its own.
    out.with_name(files_of(3)[0]).chmod(0o400)
    out.with_name(INDEX).chmod(0o644)
    ckptkit.convert(sources["new"], path, force=True, max_shard_size=SHARD_SIZES[3])
    assert [mode(out.with_name(name)) for name in files_of(3)] == [0o400, kept, kept, 0o644]
    assert held(out.parent) == "new"


def test_through_a_link_and_of_a_manifest(sources: dict[str, Path], out: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.pth"
    target.write_bytes(b"old")
    target.chmod(0o600)
    out.with_name("link.pth").symlink_to(target)
    ckptkit.convert(sources["new"], out.with_name("link.pth"), force=True)
    assert out.with_name("link.pth").is_symlink()
    assert mode(target) == 0o600
    lock = sources["new"].parent / "lock.json"
    ckptkit.manifest([sources["new"]], lock)
    lock.chmod(0o600)
    ckptkit.manifest([sources["new"]], lock, force=True)
    assert mode(lock) == 0o600
    lock.unlink()


def test_nobody_reads_meanwhile_what_few_may_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.write_bytes(b"old")
    out.chmod(0o600)
    seen: list[int] = []
    write(out, PLAN, force=True, check=lambda path, _: seen.append(mode(Path(path))))
    assert seen == [0o600]
    monkeypatch.setattr(os, "fchmod", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no")))
    write(out, PLAN, force=True)  # a file system without permissions
    assert out.read_bytes() == b"new"


def test_the_owner_stays_where_that_is_allowed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.write_bytes(b"old")
    asked: list[tuple[int, int]] = []

    def refuse(_: int, owner: int, group: int) -> None:
        asked.append((owner, group))
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    with closing(SourceFile(out)):
        write(out, PLAN, force=True)
    assert out.read_bytes() == b"new"
    assert asked == [(-1, out.stat().st_gid), (out.stat().st_uid, -1)]


def test_a_link_of_a_locked_file_is_locked_too(out: Path) -> None:
    output: Output = created(PLAN, str(out), out.name)
    second = names.beside(str(out), output.host)
    os.link(output.temporary, second)
    remove_stale(str(out.parent))
    assert len(only(out)) == 2
    output.close()
    remove_stale(str(out.parent))
    assert only(out) == []
