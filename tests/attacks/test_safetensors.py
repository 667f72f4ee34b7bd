"""safetensors headers and indexes of shards that are bombs, or lead elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

HOSTILE, REFUSED, READ, ANSWERED = "hostile", "refused", "read", "answered"

BOUNDS = {"memory": 512 << 20, "seconds": 5}
"""A quarter of what larger samples are given: what takes the square of a sample's size is far above them."""

ENTRY = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
RAW = json.dumps(ENTRY).encode()


def header(raw: bytes) -> Any:
    return lambda m: m.safetensors(raw, bytes(1))


def index(document: object) -> Any:
    return lambda m: document if isinstance(document, bytes) else json.dumps(document).encode()


SAMPLES: Any = {
    "honest": (READ, header(b'{"a":' + RAW + b"}")),
    "a header of 2^63 bytes": (REFUSED, lambda m: m.safetensors({"a": ENTRY}, bytes(1), nbytes=1 << 63)),
    "a header of 2^39 bytes": (REFUSED, lambda m: m.safetensors({"a": ENTRY}, bytes(1), nbytes=1 << 39)),
    "a header of 100 MB that is not there": (REFUSED, lambda m: m.safetensors({"a": ENTRY}, bytes(1), nbytes=100_000_000)),
    "a header of 0 bytes": (REFUSED, lambda m: m.safetensors(b"", b"{", nbytes=0)),
    "a header with a NUL": (REFUSED, header(b'{"a":' + RAW + b"}\0")),
    "text after the header": (REFUSED, header(b'{"a":' + RAW + b"} {}")),
    "arrays in arrays": (REFUSED, header(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}")),
    "objects in objects": (REFUSED, header(b'{"a":' * 200_000 + b"1" + b"}" * 200_000)),
    "objects that are never closed": (REFUSED, header(b'{"a":' * 500_000)),
    "a number of a million digits": (REFUSED, header(b'{"a":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,1]}}')),
    "a number of 4000 digits": (REFUSED, header(b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,1]}}')),
    "an exponent": (REFUSED, header(b'{"a":{"dtype":"U8","shape":[1e999999999],"data_offsets":[0,1]}}')),
    "NaN": (REFUSED, header(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}')),
    "Infinity": (REFUSED, header(b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,1]}}')),
    "minus zero": (ANSWERED, header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}')),
    "a name twice": (HOSTILE, header(b'{"a":' + RAW + b',"a":' + RAW + b"}")),
    "a name twice, once escaped": (HOSTILE, header(b'{"a":' + RAW + b',"\\u0061":' + RAW + b"}")),
    "a field twice": (HOSTILE, header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"shape":[1]}}')),
    "metadata twice": (HOSTILE, header(b'{"__metadata__":{},"__metadata__":{},"a":' + RAW + b"}")),
    "metadata that are no strings": (REFUSED, header(b'{"__metadata__":{"a":1},"b":' + RAW + b"}")),
    "metadata that nest": (REFUSED, header(b'{"__metadata__":{"a":{"b":"c"}},"b":' + RAW + b"}")),
    "metadata that is a tensor": (ANSWERED, header(b'{"__metadata__":' + RAW + b"}")),
    "half a surrogate pair": (REFUSED, header(b'{"\\ud800":' + RAW + b"}")),
    "not UTF-8": (REFUSED, header(b'{"\xff":' + RAW + b"}")),
    "a byte order mark": (REFUSED, header(b"\xef\xbb\xbf" + b'{"a":' + RAW + b"}")),
    "UTF-16": (REFUSED, lambda m: m.safetensors(('{"a":' + RAW.decode() + "}").encode("utf-16"), bytes(1))),
    "a comment": (REFUSED, header(b'{"a":' + RAW + b"/**/}")),
    "a trailing comma": (REFUSED, header(b'{"a":' + RAW + b",}")),
    "control characters in a name": (ANSWERED, header(b'{"a\x1b[31m":' + RAW + b"}")),
    "escaped control characters in a name": (READ, header(b'{"a\\u001b[31m\\u0000":' + RAW + b"}")),
    "a name of a megabyte": (ANSWERED, header(b'{"' + b"n" * 1_000_000 + b'":' + RAW + b"}")),
    "a dtype of a megabyte": (REFUSED, header(b'{"a":{"dtype":"' + b"n" * 1_000_000 + b'","shape":[1],"data_offsets":[0,1]}}')),
    "metadata of five megabytes": (READ, header(b'{"__metadata__":{"k":"' + b"n" * 5_000_000 + b'"},"a":' + RAW + b"}")),
    "metadata of 50,000 keys": (READ, lambda m: m.safetensors({"__metadata__": {str(i): "v" for i in range(50_000)}, "a": ENTRY}, bytes(1))),
    "5,000 ties": (READ, lambda m: m.safetensors({"__metadata__": {str(i): "a" for i in range(5_000)}, "a": ENTRY}, bytes(1))),
    "ties in a ring": (READ, header(b'{"__metadata__":{"b":"c","c":"b"},"a":' + RAW + b"}")),
    "half a million dimensions": (REFUSED, header(b'{"a":{"dtype":"U8","shape":[' + b"1," * 499_999 + b'1],"data_offsets":[0,1]}}')),
    "100,000 spaces": (READ, header(b'{"a":' + RAW + b"}" + b" " * 100_000)),
    # Indexes.
    "index: a path that leaves the folder": (REFUSED, index({"weight_map": {"a": "../../../etc/passwd"}})),
    "index: an absolute path": (REFUSED, index({"weight_map": {"a": "/etc/passwd"}})),
    "index: a Windows path": (REFUSED, index({"weight_map": {"a": "C:\\windows\\system32"}})),
    "index: a device": (REFUSED, index({"weight_map": {"a": "/dev/zero"}})),
    "index: the folder itself": (REFUSED, index({"weight_map": {"a": "."}})),
    "index: the index itself": (REFUSED, index({"weight_map": {"a": "file.pth"}})),
    "index: a NUL in a path": (REFUSED, index({"weight_map": {"a": "a\0b"}})),
    "index: 50,000 shards": (REFUSED, index({"weight_map": {str(i): f"{i}.safetensors" for i in range(50_000)}})),
    "index: no map": (REFUSED, index({"weight_map": []})),
    "index: a map to numbers": (REFUSED, index({"weight_map": {"a": 1}})),
    "index: a name of a megabyte": (REFUSED, index({"weight_map": {"a": "n" * 1_000_000}})),
    "index: a key twice": (REFUSED, index(b'{"weight_map":{"a":"b.safetensors","a":"c.safetensors"}}')),
    "index: arrays in arrays": (REFUSED, index(b'{"weight_map":' + b"[" * 500_000)),
    "index: a number of a million digits": (REFUSED, index(b'{"metadata":{"total_size":' + b"9" * 1_000_000 + b'},"weight_map":{}}')),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_header(name: str, court: Any) -> None:
    court.judge(name)


@pytest.mark.thorough
def test_every_command_refuses(court: Any) -> None:
    court.judge_refused()
