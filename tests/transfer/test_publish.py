"""The destination is the old file or the complete new one."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plans import DATA, only, plan_of, posix_only, some_plan, some_result, unavailable, write

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError, DestinationExistsError, FileAccessError
from ckptkit.plan import Copy, Digest, Gather, LiteralBytes
from ckptkit.transfer import steps

Entry = Callable[[torch.Tensor], TensorEntry]


def test_the_same_plan_gives_the_same_bytes(source: SourceFile, out: Path) -> None:
    write(out, some_plan(source))
    first = out.read_bytes()
    write(out, some_plan(source), force=True)
    assert out.read_bytes() == first == some_result()


def test_an_output_that_is_cut_while_it_is_written(source: SourceFile, out: Path) -> None:
    def cut(*_: int) -> None:
        for item in out.parent.iterdir():
            os.truncate(item, 100)

    with pytest.raises(FileAccessError, match=r"result\.bin: cannot be written: the output became shorter"):
        write(out, some_plan(source), progress=cut)
    assert only(out) == []


def test_a_source_that_is_cut_meanwhile(source: SourceFile, out: Path) -> None:
    os.truncate(source.path, 100_000)
    with pytest.raises(CorruptError, match="the file became shorter while it was") as caught:
        write(out, some_plan(source))
    assert caught.value.path == source.path
    assert only(out) == []


@pytest.mark.parametrize("kind", ["copy", "gather"])
def test_a_source_that_is_written_to_meanwhile(entry: Entry, source: SourceFile, out: Path, kind: str) -> None:
    tensor = entry(torch.arange(12.0).view(3, 4).t())
    file = source if kind == "copy" else tensor.storage.source.file
    step = Copy(0, ByteRange(source, 0, 1000)) if kind == "copy" else Gather(0, tensor)

    def touch(*_: int) -> None:
        with open(file.path, "r+b") as other:
            other.write(b"x")
        os.utime(file.path, ns=(1, 1))

    out.write_bytes(b"old")
    with pytest.raises(CorruptError, match="was changed while it was being converted; nothing was written"):
        write(out, plan_of(step), progress=touch, force=True)
    assert out.read_bytes() == b"old"
    assert only(out) == [out.name]


# Destinations.


def test_an_existing_destination_is_kept_without_force(source: SourceFile, out: Path) -> None:
    out.write_bytes(b"old")
    with pytest.raises(DestinationExistsError, match=r"result\.bin: already exists; --force overwrites it"):
        write(out, some_plan(source))
    assert out.read_bytes() == b"old"
    write(out, some_plan(source), force=True)
    assert out.read_bytes() == some_result()
    assert only(out) == [out.name]


@pytest.mark.parametrize("links", [True, False])
def test_a_destination_that_appears_meanwhile(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", unavailable(errno.EPERM))  # as on FAT
    with pytest.raises(DestinationExistsError):
        write(out, some_plan(source), check=lambda *_: out.write_bytes(b"theirs"))
    assert out.read_bytes() == b"theirs"
    assert only(out) == [out.name]


def test_a_file_system_without_links(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", unavailable(errno.EPERM))
    write(out, some_plan(source))
    assert out.read_bytes() == some_result()
    assert only(out) == [out.name]
    assert out.stat().st_nlink == 1


@pytest.mark.parametrize("reason", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_flushed(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    real, seen = os.fsync, []

    def fsync(fd: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        if seen[-1] == "folder":
            raise OSError(reason, os.strerror(reason))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if reason == errno.EINVAL:  # some file systems have nothing to flush there
        write(out, some_plan(source))
    else:
        with pytest.raises(FileAccessError, match="cannot be written: Input/output error"):
            write(out, some_plan(source))
    assert seen[-1] == "folder"
    assert set(seen[:-1]) == {"file"}
    assert out.read_bytes() == some_result()
    assert only(out) == [out.name]


def test_a_folder_that_cannot_be_read(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def denied(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", denied)
    write(out, some_plan(source))
    assert out.read_bytes() == some_result()


def test_without_a_check_nothing_is_waited_for(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", unavailable(errno.EIO))
    write(out, some_plan(source), check=None)
    assert out.read_bytes() == some_result()[:4] + bytes(4) + some_result()[8:]  # nor is a checksum computed


@pytest.mark.parametrize("check", [True, False])
def test_progress_goes_from_nothing_to_all(source: SourceFile, out: Path, check: bool) -> None:
    seen: list[tuple[int, int]] = []
    plan = some_plan(source)
    way = (lambda path, compared: compared(150_001)) if check else None
    write(out, plan, check=way, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {2 * plan.nbytes if check else plan.nbytes}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_destinations_that_cannot_be(source: SourceFile, out: Path) -> None:
    plan = some_plan(source)
    with pytest.raises(FileAccessError, match="is a folder; name a file"):
        write(out.parent, plan, force=True)
    with pytest.raises(FileAccessError, match=r"the folder .*missing does not exist; create it first"):
        write(out.parent / "missing" / "x", plan)
    with pytest.raises(FileAccessError, match="cannot be written: Not a directory"):
        write(Path(source.path) / "x", plan)
    assert only(out) == []


@posix_only
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_is_not_replaced(source: SourceFile, out: Path, force: bool) -> None:
    os.mkfifo(out)
    (out.parent / "link").symlink_to(out)
    for path in (out, out.parent / "link"):
        before = os.stat(path)
        with pytest.raises(FileAccessError, match=r"is a device, a pipe or a socket, and .* name a file"):
            write(path, some_plan(source), force=force)
        assert os.path.samestat(os.stat(path), before)
    assert sorted(only(out)) == sorted([out.name, "link"])


def test_a_folder_nobody_may_write_to(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def denied(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", denied)  # tests may run as root, whom nothing denies
    with pytest.raises(FileAccessError, match=r"result\.bin: cannot be written: Permission denied"):
        write(out, some_plan(source))


@posix_only
def test_the_longest_names(source: SourceFile, out: Path) -> None:
    for name in ("n" * 255, "ö" * 127, "重" * 85):
        write(out.with_name(name), some_plan(source))
        assert out.with_name(name).read_bytes() == some_result()


@posix_only
def test_a_link_stays_and_its_target_is_replaced(source: SourceFile, out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target.bin"
    out.symlink_to(target)
    write(out, some_plan(source))  # dangling: the target is made
    assert out.is_symlink()
    assert target.read_bytes() == some_result()
    target.write_bytes(b"old")
    with pytest.raises(DestinationExistsError):
        write(out, some_plan(source))
    write(out, some_plan(source), force=True)
    assert out.is_symlink()
    assert target.read_bytes() == some_result()
    assert (only(out), only(target)) == ([out.name], [target.name])


@posix_only
def test_a_source_may_be_replaced_by_what_is_made_of_it(source: SourceFile) -> None:
    path = Path(source.path)
    write(path, some_plan(source), force=True)
    assert path.read_bytes() == some_result()
    assert source.read(0, 10) == DATA[:10]  # the old file lives on while it is open
    assert only(path) == [path.name]


@posix_only
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_the_umask_decides_who_may_read(source: SourceFile, out: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write(out, some_plan(source))
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == mode


# Failures in the middle.


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "ftruncate", "fsync"])
def test_a_full_disk(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, call: str, existing: bool) -> None:
    if existing:
        out.write_bytes(b"old")
    monkeypatch.setattr(os, call, unavailable(errno.ENOSPC))
    with pytest.raises(FileAccessError, match=r"result\.bin: cannot be written: No space left on device"):
        write(out, some_plan(source), force=True)
    assert only(out) == ([out.name] if existing else [])
    assert not existing or out.read_bytes() == b"old"


@posix_only
def test_a_disk_that_fills_up_while_copying(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", unavailable(errno.EOPNOTSUPP))
    for name in ("splice", "copy_file_range"):
        monkeypatch.setattr(os, name, unavailable(errno.ENOSPC))
    with pytest.raises(FileAccessError, match="No space left on device"):
        write(out, some_plan(source))
    assert only(out) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, MemoryError, RuntimeError])
@pytest.mark.parametrize("where", ["progress", "check"])
def test_an_interrupt_leaves_the_old_file_alone(
    source: SourceFile, out: Path, failure: type[BaseException], where: str
) -> None:
    out.write_bytes(b"old")

    def interrupt(*_: object) -> None:
        assert len(only(out)) == 2  # there is a temporary file now
        raise failure

    with pytest.raises(failure):
        write(out, some_plan(source), force=True, **{where: interrupt})
    assert out.read_bytes() == b"old"
    assert only(out) == [out.name]


def test_the_check_sees_the_complete_file(source: SourceFile, out: Path) -> None:
    seen: list[bytes] = []

    def check(path: str, compared: object) -> None:
        assert Path(path).parent == out.parent
        assert not out.exists()
        seen.append(Path(path).read_bytes())

    write(out, some_plan(source), check=check)
    assert seen == [some_result()]


def test_a_failing_check_leaves_the_old_file_alone(source: SourceFile, out: Path) -> None:
    out.write_bytes(b"old")

    def check(*_: object) -> None:
        raise CorruptError("it differs")

    with pytest.raises(CorruptError, match="it differs"):
        write(out, some_plan(source), force=True, check=check)
    assert out.read_bytes() == b"old"
    assert only(out) == [out.name]


def test_a_failing_rename_leaves_the_old_file_alone(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", unavailable(errno.EIO))
    with pytest.raises(FileAccessError, match="cannot be written: Input/output error"):
        write(out, some_plan(source), force=True)
    assert out.read_bytes() == b"old"
    assert only(out) == [out.name]


@posix_only
def test_kill_leaves_the_old_file_alone(tmp_path: Path, out: Path) -> None:
    out.write_bytes(b"old")
    (tmp_path / "data").write_bytes(DATA)
    program = textwrap.dedent(
        f"""
        import time
        from ckptkit.bytesource import ByteRange, SourceFile
        from ckptkit.plan import Copy, Plan
        from ckptkit.transfer.writing import write_atomically

        source = SourceFile({str(tmp_path / "data")!r})
        steps = tuple(Copy(at, ByteRange(source, 7, 20_000)) for at in range(0, 4_000_000, 20_000))
        plan = Plan(format="bytes", nbytes=4_000_000, steps=steps, tensors=0, aliases={{}})
        done = []

        def slow(done_now, total):
            done.append(done_now)
            if len(done) == 100:
                print("half", flush=True)
                time.sleep(60)

        write_atomically({str(out)!r}, plan, force=True, check=None, progress=slow)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert out.read_bytes() == b"old"
    # What was being written has a name of its own that the next run does not stumble over.
    left = [name for name in only(out) if name != out.name]
    assert len(left) == 1
    assert left[0].startswith(".result.")
    assert left[0].endswith(".tmp.bin")
    with closing(SourceFile(tmp_path / "data")) as file:
        write(out, some_plan(file), force=True)
    assert out.read_bytes() == some_result()


def test_interrupted_between_two_copies(source: SourceFile, out: Path) -> None:
    """One kernel copy is bounded, so that an interrupt is heard between two."""
    assert steps._ONE_CALL <= 64 << 20
    with pytest.raises(KeyboardInterrupt):
        write(out, some_plan(source), progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))


@posix_only
def test_interrupted_twice_nothing_is_left(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.unlink

    def interrupt(*_: object) -> None:
        monkeypatch.setattr(os, "unlink", lambda path: (os.kill(os.getpid(), signal.SIGINT), real(path)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(out, some_plan(source), progress=interrupt)
    assert only(out) == []


def test_a_digest_that_fails_while_bytes_are_moved(source: SourceFile, out: Path, tmp_path: Path) -> None:
    (tmp_path / "hashed").write_bytes(bytes(1000))
    with closing(SourceFile(tmp_path / "hashed")) as hashed:
        os.truncate(hashed.path, 10)
        copies = [Copy(64 + 100 * number, ByteRange(source, 0, 100)) for number in range(20)]
        plan = plan_of(LiteralBytes(0, bytes(64)), *copies, Digest(0, hashed))
        with pytest.raises(CorruptError, match="became shorter while it was being read") as caught:
            write(out, plan, progress=lambda *_: time.sleep(0.005))
        assert caught.value.path == hashed.path
    assert only(out) == []
