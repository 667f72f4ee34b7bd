"""Files as ckptkit opens them and writes them, what is made by hand, and damage done to it."""

from __future__ import annotations

import filecmp
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint, TensorEntry
from ckptkit.errors import FormatError
from ckptkit.plan import LiteralBytes, Plan
from ckptkit.rewrite import WeightsOnly
from ckptkit.transfer.steps import execute
from ckptkit.transfer.values import stream
from ckptkit.transfer.writing import write_atomically

Save = Callable[..., Path]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """The checkpoint, as the rewriters and writers see it, while its file is open."""
    checkpoint, file = formats.read(path)
    with closing(file):
        yield checkpoint


def written(checkpoint: Checkpoint, path: Path) -> Path:
    """The checkpoint (to safetensors its weights alone) as its writer writes it, unchecked."""
    if path.suffix == ".safetensors":
        checkpoint = WeightsOnly()(checkpoint)
    write = formats.format_for(path).write
    assert write is not None
    with path.open("w+b") as file:
        execute(write(checkpoint), file.fileno())
    return path


def published(plan: Plan, target: Path) -> Plan:
    """What is planned, written, and not compared."""
    write_atomically(target, plan, force=True, check=None)
    return plan


def filled(plan: Plan, path: Path) -> Path:
    """A file as large as planned, with nothing in it but what does not come from other files."""
    with path.open("wb") as out:
        out.truncate(plan.nbytes)
        for step in plan.steps:
            if isinstance(step, LiteralBytes):
                out.seek(step.target)
                out.write(step.data)
    return path


def extents(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's storage begins in a file, and its bytes."""
    with opened(path) as checkpoint:
        return {name: (e.storage.source.offset, e.storage.nbytes) for name, e in checkpoint.state_dict.items()}


def same_files(a: Path | str, b: Path | str) -> bool:
    """Whether two folders have the same files, to the byte, and nothing else, hidden or not."""
    names = sorted(os.listdir(a))
    equal = filecmp.cmpfiles(a, b, names, shallow=False)[0]
    return bool(names) and names == sorted(os.listdir(b)) == sorted(equal)


def flipped(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def read(path: Path) -> Checkpoint:
    """The checkpoint, its file closed."""
    with opened(path) as checkpoint:
        return checkpoint


@contextmanager
def one_float(save: Save) -> Iterator[TensorEntry]:
    """A tensor of one float, while its file is open."""
    with opened(save(torch.ones(1), "one.pth")) as checkpoint:
        assert isinstance(checkpoint.rest, TensorEntry)
        yield checkpoint.rest


def tensor_of(entry: object) -> torch.Tensor:
    """An entry's values, by the bytes that ckptkit streams."""
    assert isinstance(entry, TensorEntry)
    data = bytearray(b"".join(stream(entry)))
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(getattr(torch, entry.dtype)).reshape(entry.shape)


def codes(checkpoint: Checkpoint) -> list[str]:
    """Those of what the reader noticed."""
    return [finding.code for finding in checkpoint.findings]


def sections(checkpoint: Checkpoint) -> list[tuple[str, str, bool]]:
    """Path and kind of each, and whether it is the selected one."""
    return [(section.path, section.kind, section.selected) for section in checkpoint.sections]


# Archives.


def repacked(
    path: Path,
    change: Callable[[str, bytes], tuple[str, bytes] | None] = lambda name, data: (name, data),
    *,
    deflate: bool = False,
    more: Any = (),
) -> Path:
    """The archive with each record changed or dropped, and more added."""
    target = path.with_name(f"repacked{path.suffix}")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        records = [change(name, source.read(name)) for name in source.namelist()]
        for name, data in [record for record in records if record is not None] + list(more):
            out.writestr(name, data, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    return target


def with_data(path: Path, change: Callable[[str, bytes], bytes | None], more: Any = ()) -> Path:
    """The archive with the data of each record changed, or the record dropped; names without their root folder."""

    def changed(name: str, data: bytes) -> tuple[str, bytes] | None:
        new = change(name.partition("/")[2], data)
        return None if new is None else (name, new)

    return repacked(path, changed, more=more)


def tarred(records: Mapping[str, bytes]) -> bytes:
    """A tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in records.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def assert_refused_when_cut(path: Path) -> None:
    """Fails unless the archive, cut off before any of its records, is an error."""
    with zipfile.ZipFile(path) as archive:
        offsets = [info.header_offset for info in archive.infolist()]
    data = path.read_bytes()
    for length in offsets:
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            formats.read(path)


def source_of(data: bytes, folder: Path) -> SourceFile:
    """An open file with these bytes."""
    (folder / "file.zip").write_bytes(data)
    return SourceFile(folder / "file.zip")


# Pickles of torch before 1.6.

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYS_INFO = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class Pid:
    """Stands for a persistent id in what `dumped` pickles."""

    def __init__(self, *pid: object) -> None:
        self.pid = pid


class Call:
    """Pickled as a call."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> object:
        return obj.pid if isinstance(obj, Pid) else None


def dumped(obj: object, protocol: int = 2) -> bytes:
    """A pickle with persistent ids."""
    out = io.BytesIO()
    _Pickler(out, protocol).dump(obj)
    return out.getvalue()


def deflated_copy(path: Path, target: Path) -> Path:
    """The same archive, compressed (little, which is soon done)."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return target
