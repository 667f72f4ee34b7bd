"""torch-legacy: one test for each error, and a file cut off at every byte."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import MAGIC, PROTOCOL, SYS_INFO, Call, Pid, dumped
from support.repeated import repeated

from ckptkit import formats
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, UnknownFormatError, UnsupportedError


def vector(key: str, numel: int) -> Call:
    storage = Pid("storage", torch.FloatStorage, key, "cpu", numel, None)
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, (numel,), (1,), False, {})


def counted(*values: float, order: str = "<") -> bytes:
    return struct.pack(f"{order}q{len(values)}f", len(values), *values)


STATE = {"first": vector("10", 2), "second": vector("11", 1), "third": vector("12", 3)}
KEYS = ["10", "11", "12"]
STORAGES = (counted(1, 2), counted(3), counted(4, 5, 6))


def file(
    *storages: bytes,
    magic: object = MAGIC,
    version: object = PROTOCOL,
    info: object = SYS_INFO,
    obj: object = STATE,
    keys: object = KEYS,
) -> bytes:
    return b"".join([*map(dumped, (magic, version, info, obj, keys)), *(storages or STORAGES)])


def opened(data: bytes, tmp_path: Path) -> Any:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    checkpoint, source = formats.read(path)
    source.close()
    return checkpoint


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
    return out.getvalue()


def test_the_file_without_an_error(tmp_path: Path) -> None:
    assert list(opened(file(), tmp_path).state_dict) == ["first", "second", "third"]
    assert list(opened(file(info={}), tmp_path).state_dict) == ["first", "second", "third"]
    assert list(opened(file(info={**SYS_INFO, "little_endian": False}), tmp_path).state_dict)
    torch.load(tmp_path / "model.pt", weights_only=True)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_it_is_known_by_its_first_pickle_of_any_protocol(protocol: int, tmp_path: Path) -> None:
    head = b"".join(dumped(value, protocol) for value in (MAGIC, PROTOCOL, SYS_INFO))
    data = head + dumped(STATE) + dumped(KEYS) + b"".join(STORAGES)
    assert opened(data, tmp_path).origin.format == "torch-legacy"


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (file(magic=MAGIC + 1), UnknownFormatError, "pickle"),
        (file(magic=str(MAGIC)), UnknownFormatError, "pickle"),
        (file(version=1000), UnsupportedError, "protocol version: protocol version 1000; 1001 is supported"),
        (file(version="x"), UnsupportedError, "protocol version a str"),
        (file(version=True), UnsupportedError, "protocol version True"),
        (file(info=[]), CorruptError, "sys_info: a dict is expected"),
        (file(info=Call(print, "x")), CorruptError, "plain values are expected, not the names __builtin__.print"),
        (file(info=Pid("storage")), CorruptError, "sys_info, byte 21: plain values are expected: torch did not write"),
        (file(obj=Pid("other")), UnsupportedError, "object, byte [0-9]+: a persistent id that is not a torch storage"),
        (file(keys=("10", "11", "12")), CorruptError, "storage keys: a list of strings is expected"),
        (file(keys=[10, 11, 12]), CorruptError, "storage keys: a list of strings is expected"),
        (file(keys=Call(list, KEYS)), CorruptError, "storage keys, byte [0-9]+: plain values are expected"),
        (file(keys=[*KEYS, "13"]), CorruptError, "1 storage that the object does not name: '13'"),
        (file(keys=["12", *KEYS]), AmbiguousError, "storages are listed twice: '12'"),
        (file(keys=["10", "12"]), CorruptError, "1 storage of the object not listed: '11'"),
        (file(counted(1, 2), counted(3), counted(4, 5)), CorruptError, "storage '12'.*2 elements are here.*says 3"),
        (file(counted(1, 2), struct.pack("<qf", -1, 0), STORAGES[2]), CorruptError, "'11', byte .*: -1 elements"),
        (file(counted(1, 2, order=">"), *STORAGES[1:]), UnsupportedError, "'10', byte .*: its count is big-endian"),
        (file() + b"\0", AmbiguousError, "1 byte follows the last storage, which torch does not read"),
        (file() + file(), AmbiguousError, "another checkpoint, saved into the same file"),
        (file() + pickle.dumps({}, 2), AmbiguousError, "bytes follow the last storage, which torch does not read"),
        (file() + zipped(), AmbiguousError, "at once|bytes follow the last storage"),
    ],
)
def test_refusals(data: bytes, error: type[FormatError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words) as caught:
        opened(data, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "model.pt"))


def test_names_in_any_of_the_pickles_are_reported_with_the_error(tmp_path: Path) -> None:
    for data in (file(info=Call(print, "x")), file(obj=[Call(print), Pid("x")]), file(obj=Call(print), keys=3)):
        with pytest.raises(FormatError) as caught:
            opened(data, tmp_path)
        assert "__builtin__.print" in [use.name for use in caught.value.globals]


@repeated("every", 3, 1)
def test_a_file_cut_off_anywhere_is_refused(every: int, tmp_path: Path) -> None:
    data = file()
    for end in range(len(data) - 1, -1, -every):
        with pytest.raises(FormatError) as caught:
            opened(data[:end], tmp_path)
        assert str(tmp_path / "model.pt") in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (1, "1 missing.; 2 of 3 storages are complete, 2 of 3 tensors are whole, the first incomplete one is 'third'"),
        (12, "12 missing.; 2 of 3 storages are complete, 2 of 3 tensors are whole"),
        (20, "20 missing.; 2 of 3 storages are complete"),
        (21, "21 missing.; 1 of 3 storages is complete, 1 of 3 tensors is whole, .* one is 'second'"),
        (48, "48 missing.; 0 of 3 storages are complete, 0 of 3 tensors are whole, .* one is 'first'"),
        (49, "0 of 3 storages are complete, 0 of 3 tensors are whole, the first incomplete one is .first"),
    ],
)
def test_a_truncated_file_is_told_what_is_whole(missing: int, words: str, tmp_path: Path) -> None:
    data = file()
    with pytest.raises(CorruptError, match=words) as caught:
        opened(data[:-missing], tmp_path)
    if missing < 49:
        assert f"has {len(data) - missing:,} bytes, but at least {len(data):,} are expected" in str(caught.value)


def test_a_wrong_count_is_told_before_a_cut(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="9 elements are here"):
        opened(file(*STORAGES[:2], struct.pack("<qf", 9, 0)), tmp_path)


@repeated("every", 3, 1)
def test_bits_flipped_anywhere_never_raise_anything_else(every: int, tmp_path: Path) -> None:
    data = file()
    for place in range(0, len(data), every):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        try:
            opened(bytes(changed), tmp_path)
        except FormatError as error:
            assert str(tmp_path / "model.pt") in str(error)
