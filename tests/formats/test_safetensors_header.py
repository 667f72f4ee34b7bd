"""The header of safetensors: every error has its message, and what the library refuses we refuse."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.repeated import repeated

import ckptkit
from ckptkit import formats
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, DTypeError, FormatError, LimitError, UnknownFormatError
from ckptkit.formats import safetensors as reader
from ckptkit.limits import Limits
from ckptkit.transfer.values import stream


def file_bytes(header: object, data: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def info(dtype: object = "U8", shape: object = (4,), begin: object = 0, end: object = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


A = {"a": info()}
DEEP = b"[" * 100_000 + b"]" * 100_000

REFUSED: dict[str, tuple[bytes, type[FormatError], str]] = {
    "header longer than the file": (file_bytes(A, b"abcd", size=1000), CorruptError,
        "truncated: a header of 1,000 bytes is declared, but the file has 72 in all and no tensors"),
    "header too large, file small": (file_bytes(A, b"abcd", size=200_000_000), CorruptError,
        "say that 200,000,000 bytes of header follow; the file has 72, and no reader accepts more than 100,000,000"),
    "header cut": (file_bytes(A, b"abcd", size=10), CorruptError, "header, byte [0-9]+: the header is not valid JSON"),
    "a brace alone": (file_bytes(b"{"), CorruptError, "byte 1: the header is not valid JSON: Expecting property"),
    "a line in a name": (file_bytes(b'{"a\nb":1}'), CorruptError, "the header is not valid JSON: .* character$"),
    "mismatched brackets": (file_bytes(b"{]"), CorruptError, "header, byte 1: the header is not valid JSON"),
    "something behind": (file_bytes(b"{} x"), CorruptError, "header, byte 3: the header is not valid JSON: Extra data"),
    "zeros behind": (file_bytes(b"{}\0\0"), CorruptError, "header, byte 2: the header is not valid JSON: Extra data"),
    "a control character": (file_bytes(b'{"\n":1}'), CorruptError, "not valid JSON: Invalid control character"),
    "NaN": (file_bytes(b'{"a":NaN}'), CorruptError, "not valid JSON: NaN is not a number in JSON"),
    "a deep list": (file_bytes(b'{"a":' + DEEP + b"}"), CorruptError, "nested too deeply|described by a list"),
    "a deep object": (file_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), CorruptError, "nested too deep|missing"),
    "a deep unknown field": (file_bytes({"a": info() | {"x": json.loads("[" * 150 + "]" * 150)}}, b"abcd"),
        CorruptError, "tensor 'a', field 'x': nested more than 100 levels deep"),
    "a number of 5,000 digits": (file_bytes(b'{"a":{"dtype":"U8","shape":[1' + b"0" * 5000 + b']}}'), CorruptError,
        "a number with too many digits"),
    "an endless number": (file_bytes(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1e999}}', b"abcd"),
        CorruptError, "field 'x': a number too large for any reader"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), CorruptError, "header, byte 2: the header is not UTF-8: byte 0xff"),
    "a BOM": (file_bytes(b"{}", size=5)[:8] + b"\xef\xbb\xbf{}", UnknownFormatError, "begins with"),
    "half a surrogate pair": (file_bytes(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), CorruptError,
        "half a surrogate pair in the header"),
    "half a pair in metadata": (file_bytes(b'{"__metadata__":{"a":"\\udc00"}}'), CorruptError, "half a surrogate pair"),
    "half a pair nobody reads": (file_bytes(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":["\\udc00"]}}',
        b"abcd"), CorruptError, "field 'x': half a surrogate pair"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}} | A, b"abcd"), CorruptError,
        "__metadata__ must map strings to strings; the value of 'a' is a number"),
    "metadata of nulls": (file_bytes({"__metadata__": {"a": None}} | A, b"abcd"), CorruptError, "value of 'a' is null"),
    "metadata of objects": (file_bytes({"__metadata__": {"a": {}}}), CorruptError, "the value of 'a' is an object"),
    "metadata like a tensor": (file_bytes({"__metadata__": info()} | A, b"abcd"), CorruptError, "__metadata__ must be"),
    "metadata a list": (file_bytes({"__metadata__": ["a"]} | A, b"abcd"), CorruptError, "__metadata__ must be an obj"),
    "an entry that is a number": (file_bytes({"a": 1}), CorruptError, "tensor 'a' is described by a number, not by an"),
    "the header like a tensor": (file_bytes(info("U8", [0], 0, 0)), CorruptError, "the header is not a JSON object"),
    "no offsets": (file_bytes({"a": {"dtype": "U8", "shape": [4]}}, b"abcd"), CorruptError,
        "tensor 'a': data_offsets missing; dtype, shape and data_offsets are expected"),
    "no dtype, no shape": (file_bytes({"a": {"data_offsets": [0, 4]}}), CorruptError, "dtype and shape missing"),
    "unknown dtype": (file_bytes({"a": info(dtype="X99")}, b"abcd"), CorruptError, "unknown dtype 'X99'; known: F64"),
    "torch's name": (file_bytes({"a": info(dtype="float32")}, b"abcd"), CorruptError, "unknown dtype 'float32'"),
    "dtype a list": (file_bytes({"a": info(dtype=["U8"])}, b"abcd"), CorruptError, "its dtype is a list, not a string"),
    "dtype null": (file_bytes({"a": info(dtype=None)}, b"abcd"), CorruptError, "its dtype is null, not a string"),
    "shape a string": (file_bytes({"a": info(shape="4")}, b"abcd"), CorruptError, "whole numbers .* it is a string"),
    "shape of floats": (file_bytes({"a": info(shape=[4.0])}, b"abcd"), CorruptError, r"it is \[4.0\]"),
    "shape negative": (file_bytes({"a": info(shape=[-4])}, b"abcd"), CorruptError, r"it is \[-4\]"),
    "shape minus zero": (file_bytes(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), CorruptError,
        r"its shape must be a list of whole numbers from 0 to 2\^62; it is \[-0.0\]"),
    "shape of booleans": (file_bytes({"a": info(shape=[True])}, b"a"), CorruptError, r"it is \[True\]"),
    "shape huge": (file_bytes({"a": info(shape=[1 << 62, 4])}, b"abcd"), CorruptError, "whole numbers from 0 to"),
    "shape nested": (file_bytes({"a": info(shape=[[4]])}, b"abcd"), CorruptError, r"it is \[a list\]"),
    "an overflow beside a zero": (file_bytes({"a": info(shape=[1 << 40, 1 << 40, 0], end=0)}), CorruptError,
        "overflows 64 bits before its 0"),
    "offset negative": (file_bytes({"a": info(begin=-1)}, b"abcd"), CorruptError, "data_offsets must be two whole"),
    "three offsets": (file_bytes({"a": info() | {"data_offsets": [0, 4, 4]}}, b"abcd"), CorruptError, r"\[0, 4, 4\]"),
    "offsets a number": (file_bytes({"a": info() | {"data_offsets": 0}}, b"abcd"), CorruptError, "it is a number"),
    "offsets turned round": (file_bytes({"a": info(begin=4, end=0)}, b"abcd"), CorruptError,
        "its data_offsets end at 0, before they begin at 4"),
    "too long a shape": (file_bytes({"a": info(shape=[5])}, b"abcd"), CorruptError,
        r"shape \[5\] of U8 is 5 bytes, but its data_offsets cover 4"),
    "too wide a dtype": (file_bytes({"a": info(dtype="F32", shape=[2])}, b"abcd"), CorruptError, "F32 is 8 bytes"),
    "an endless product": (file_bytes({"a": info(shape=[1 << 61] * 3)}, b"abcd"), CorruptError, r"is over 2\^62 bytes"),
    "a hole": (file_bytes({"a": info(), "b": info(begin=6, end=10)}, bytes(10)), CorruptError,
        "tensor 'b': data at 6 leaves a hole of 2 bytes"),
    "a hole in front": (file_bytes({"a": info(begin=2, end=6)}, bytes(6)), CorruptError, "leaves a hole of 2 bytes"),
    "an overlap": (file_bytes({"a": info(), "b": info(begin=2, end=6)}, bytes(6)), CorruptError,
        "tensor 'b': data at 2 overlaps another tensor"),
    "the same place": (file_bytes({"a": info(), "b": info()}, bytes(4)), CorruptError, "overlaps another tensor"),
    "nothing inside another": (file_bytes({"a": info(), "b": info(shape=[0], begin=2, end=2)}, bytes(4)), CorruptError,
        "tensor 'b': data at 2 overlaps another tensor"),
    "bytes behind": (file_bytes(A, b"abcde"), CorruptError, "data, byte 4: 1 byte follows the last tensor"),
    "bytes behind nothing": (file_bytes({}, b"a"), CorruptError, "data, byte 0: 1 byte follows the last tensor"),
    "data cut": (file_bytes(A | {"b": info(begin=4, end=8)}, bytes(6)), CorruptError,
        "data: truncated: 6 of 8 bytes of data are present .2 missing.; 1 of 2 tensors is complete, the first "
        "incomplete one is 'b'. Download or copy the file again"),
    "data missing": (file_bytes(A), CorruptError, "0 of 4 bytes of data are present .4 missing.; 0 of 1 tensor is"),
    "an empty header": (file_bytes(b""), UnknownFormatError, "8 bytes of zeros"),
    "no header": (file_bytes(b"", b"abcd", size=1), UnknownFormatError, "named .safetensors, but it is not one"),
    "no brace": (file_bytes(b"[1]     "), UnknownFormatError, "say that 8 bytes of header follow .* begins with b'.1"),
    "too short for a length": (b"\x08\0\0\1", UnknownFormatError, "4 bytes are too few for the length of its header"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    data, error, words = REFUSED[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(error, match=words) as caught:
        formats.read(path)
    assert len(str(caught.value)) < 1500
    with pytest.raises((safetensors.SafetensorError, OverflowError)):
        load_file(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
         "the name 'a' appears twice in the header"),
        (b' {"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "the header begins with b' {.*', not with '{'"),
        (b'{"a":["U8",[4],[0,4]]}', "tensor 'a' is described by a list, not by an object"),
        (b'{"a":{"dtype":{"U8":null},"shape":[4],"data_offsets":[0,4]}}', "its dtype is an object, not a string"),
    ],
)  # fmt: skip
def test_what_we_refuse_and_the_library_takes(header: bytes, words: str, tmp_path: Path) -> None:
    """Each is something on which other parsers of the format disagree with it."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes(header, b"abcd"))
    with pytest.raises(FormatError, match=words):
        formats.read(path)
    assert load_file(path)["a"].tolist() == list(b"abcd")


@pytest.mark.parametrize(("dtype", "shape", "nbytes", "name", "torchs"), [
    ("F4", [4, 16], 32, "float4_e2m1fn_x2", (4, 8)),
    ("F4", [2, 3], 3, "float4_e2m1fn", (2, 3)),
    ("F4", [0], 0, "float4_e2m1fn_x2", (0,)),
    ("F6_E2M3", [4], 3, "float6_e2m3fn", (4,)),
    ("F6_E3M2", [2, 6], 9, "float6_e3m2fn", (2, 6)),
])  # fmt: skip
def test_elements_that_fill_no_byte(
    dtype: str, shape: list[int], nbytes: int, name: str, torchs: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes({"a": info(dtype, shape, 0, nbytes), "b": info(begin=nbytes, end=nbytes + 4)},
                                bytes(range(1, nbytes + 5))))  # fmt: skip
    with safe_open(path, "pt") as library:
        assert library.get_slice("a").get_shape() == shape
    with ckptkit.open(path) as file:
        entry = file.state_dict["a"]
        assert (entry.dtype, entry.shape, entry.nbytes) == (name, torchs, nbytes)
        assert b"".join(stream(entry)) == bytes(range(1, nbytes + 1))
    (row, _) = ckptkit.inspect(path, stats=True)["tensors"]
    assert (row["dtype"], row["nbytes"]) == (name, nbytes)
    assert ckptkit.check(path, no_nan=True).ok  # no pattern of them is NaN
    ckptkit.convert(path, tmp_path / "copy.safetensors", receipt=False)
    assert ckptkit.diff(path, tmp_path / "copy.safetensors").equal
    with safe_open(tmp_path / "copy.safetensors", "pt") as library:
        assert (library.get_slice("a").get_shape(), library.get_slice("a").get_dtype()) == (shape, dtype)
    with pytest.raises(DTypeError, match="cannot be cast"):
        ckptkit.convert(path, tmp_path / "cast.safetensors", dtype="bfloat16")
    if name != "float4_e2m1fn_x2":
        with pytest.raises(DTypeError, match=f"torch has no dtype for 1 tensor: a .{name}.*--exclude a"):
            ckptkit.convert(path, tmp_path / "m.pth")
        with pytest.raises(DTypeError, match=f"'a'.*no dtype {name}"):
            ckptkit.load_state_dict(path)
        ckptkit.convert(path, tmp_path / "m.pth", exclude="a")
        assert list(torch.load(tmp_path / "m.pth", weights_only=True)) == ["b"]


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes({"a": info(shape=[1] * 64 + [4]), "b": info(begin=4, end=8)}, bytes(8)))
    for limits, words in (
        (Limits(header_nbytes=20), "bytes of a safetensors header"),
        (Limits(json_values=20), "values in the header: 78 is over the limit of 20"),
        (Limits(entries=1), "tensors in one file: 2 is over the limit of 1"),
        (Limits(), "dimensions of tensor 'a': 65 is over the limit of 64"),
    ):
        with pytest.raises(LimitError, match=words):
            formats.read(path, limits=limits)
    path.write_bytes(file_bytes(b'{"a" :1,"b"\n:2}'))
    with pytest.raises(LimitError, match="keys in the header: 2 is over the limit of 1"):
        formats.read(path, limits=Limits(json_values=3))


def test_a_name_given_twice_among_very_many_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    names = ",".join(f'"{n}":1' for n in range(100_000))
    path.write_bytes(file_bytes(f'{{{names},"99999":1}}'.encode()))
    with pytest.raises(CorruptError, match="'99999' appears twice"):
        formats.read(path)


def test_a_megabyte_of_a_name_is_not_repeated_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes({"x" * 1_000_000: 1}))
    with pytest.raises(CorruptError) as caught:
        formats.read(path)
    assert len(str(caught.value)) < 1000


def test_wide_characters_in_a_large_header_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes(b'{"__metadata__":{"' + b"x" * 25_000_000 + '😀":""}}'.encode()))
    with pytest.raises(LimitError, match="with characters beyond U"):
        formats.read(path)


# Mutations: whatever the library refuses we refuse, whatever both accept is equal.


DIFFERENCES = re.compile(
    "stands twice|described by a list|its dtype is an object|not with '{'|whole numbers from 0|nested more"
)
"""What we refuse and the library may take; `ckptkit.formats.safetensors` says why."""


def agree(path: Path) -> bool:
    """Whether both readers take the file; what both take is the same, and they differ only where it is meant."""
    try:
        theirs: dict[str, Any] | None = load_file(path)
    except (safetensors.SafetensorError, OverflowError, TypeError, RuntimeError):
        theirs = None
    try:
        checkpoint, file = formats.read(path)
    except FormatError as error:
        assert theirs is None or DIFFERENCES.search(str(error)), "the library takes what we refuse"
        return False
    with_aliases = checkpoint.state_dict
    if theirs is None and any(DTYPES[entry.dtype].bits for entry in checkpoint.state_dict.values()):
        with safe_open(path, "np") as library:  # what torch has no dtype for, the library lists
            assert set(library.keys()) <= set(checkpoint.state_dict)
        return True
    assert theirs is not None, "the library refuses what we take"
    assert set(theirs) <= set(with_aliases)
    for name, value in theirs.items():
        entry = with_aliases[name]
        assert entry.dtype == str(value.dtype).removeprefix("torch.")
        assert entry.shape == tuple(value.shape)
        assert b"".join(stream(entry)) == bytes(value.reshape(-1).view(torch.uint8).tolist())
    file.close()
    return True


@repeated("bits", range(1, 8, 2), range(8))
def test_every_flipped_bit_of_the_header_is_read_as_the_library_reads_it(bits: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(3.0), "b": torch.arange(5)}, path, metadata={"k": "v"})
    data = path.read_bytes()
    taken = 0
    for at in range(8 + int.from_bytes(data[:8], "little")):
        for bit in bits:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            taken += agree(path)
    assert taken > 10, "a name's letters may change"


PIECES = st.sampled_from([
    b"{", b"}", b"[", b"]", b",", b":", b'"', b" ", b"\n", b"0", b"1", b"4", b"8", b"-", b"-0", b"1e0", b"4.0", b"null",
    b"true", b'"dtype"', b'"F32"', b'"U8"', b'"shape"', b'"data_offsets"', b'"x":1,', b'"x":[{}],', b"[]", b"{}",
    b"9007199254740993", b"18446744073709551616", b"1e400", b"\\ud83d\\ude00", b"\\ud83d", b"\\u0061", b"\xc3\xa9",
    b"\xff", b"NaN", b"Infinity", b"/**/", b"\\/", b"\x00", b'"__metadata__":{},', b'"__metadata__":null,',
])  # fmt: skip
HEADER = json.dumps({"__metadata__": {"k": "v"}, "a": info("F32", [1], 0, 4), "b": info("U8", [2, 2], 4, 8)}).encode()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(HEADER)), st.integers(0, 6), PIECES), min_size=1, max_size=3),
    extra=st.sampled_from([0, 0, 0, -1, 1]),
)
def test_mutated_headers_are_read_as_the_library_reads_them(
    edits: list[tuple[int, int, bytes]], extra: int, tmp_path: Path
) -> None:
    text = HEADER
    for at, cut, piece in edits:
        text = text[:at] + piece + text[at + cut :]
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes(text, b"\1\2\3\4\5\6\7\x08"[: 8 + min(extra, 0)] + b"x" * max(extra, 0)))
    agree(path)


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 2**31, 2**32, 2**61, 2**62, 2**63, 2**64 - 1, 2**64, -1, 1.0, True, None, "1"]
)


DESCRIBED = given(
    fields=st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F32", "BOOL", "F64", "C64", "F4", "u8", "", None, 1]),
            "shape": st.lists(NUMBERS, max_size=4),
            "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | st.just([0, 4]) | st.just([0, 0]),
        },
        optional={"x": st.recursive(NUMBERS, lambda below: st.lists(below) | st.dictionaries(st.text(), below))},
    ),
    nbytes=st.sampled_from([0, 4, 8]),
)


@repeated("examples", 60, 150)
def test_descriptions_of_all_kinds_are_read_as_the_library_reads_them(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples, deadline=None)
    @DESCRIBED
    def are_read(fields: dict[str, Any], nbytes: int) -> None:
        path = tmp_path / "m.safetensors"
        path.write_bytes(file_bytes({"a": fields}, bytes(nbytes)))
        agree(path)

    are_read()


@repeated("times", 1500, 4000)
def test_both_ways_through_a_header_say_the_same(times: int) -> None:
    """A pattern reads headers as the library writes them, JSON's reader any other: of no header may they differ."""
    random = Random(0)
    sizes = [[4, 2], [], [3], [0, 5], [2, 2, 2]]
    headers = [b"{}", b'{"__metadata__":{}}']
    for own in ({}, {"__metadata__": {"format": "pt", 'x\n"y': "a,b}{"}}):
        header, end = dict[str, Any](own), 0
        for number in range(5):
            shape = random.choice(sizes)
            header[f"a.{number}.w"] = info("BF16", shape, end, end := end + 2 * math.prod(shape))
        headers.append(json.dumps(header, separators=(",", ":")).encode())
    odd = (b'"', b",", b"{", b"}", b"[", b"]", b"0", b"00", b"-0", b" ", b"\\", b":", b"9" * 19, b"9" * 5000, b"1.0",
           b'"a.0.w"', b'"__metadata__"', b"}}", b"},", b"\n", b"\x01", b"F32", b'"data_offsets":[0,16]},')  # fmt: skip

    def outcome(read: Callable[[bytes, Limits], object], raw: bytes) -> str:
        try:
            return repr(read(raw, Limits()))
        except FormatError as error:
            return f"{type(error).__name__}: {error}"

    quick = 0
    for _ in range(times):
        raw = bytearray(random.choice(headers))
        for _ in range(random.choice((0, 1, 1, 2, 3))):
            at = random.randrange(len(raw) + 1)
            raw[at : at + random.choice((0, 0, 1, 3))] = random.choice((b"", *odd))
        quick += outcome(reader._customary, bytes(raw)).startswith("({")
        with mock.patch.object(reader, "_customary", return_value=None):
            slow = outcome(reader._layouts, bytes(raw))
        assert outcome(reader._layouts, bytes(raw)) == slow, bytes(raw)
    assert 0.1 < quick / times < 0.9
