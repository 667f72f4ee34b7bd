"""The records of `ckptkit.formats.distributed.dcp_runs` as patterns: how protocols 4 and 5 of pickle spell each.

Classes and keys depend on the memo of one pickle, so each pickle has its own patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

__all__ = ["Match", "index_of", "number_of", "pattern_of", "puts_of", "spelled"]

Match = Callable[[bytes, int], "re.Match[bytes] | None"]
"""From bytes and a position to what was found there."""

_INT = rb"(?:K.|M..|J....|\x8a\x05.{5}|\x8a\x06.{6}|\x8a\x07.{7}|\x8a\x08.{8})"
_GET = rb"(?:h.|j....)"
_TEXT = rb"(\x8c.[^\x94]*\x94|X....[^\x94]*\x94|h.|j....)"
"""A string and its PUT, whose length is checked against its bytes after the match; or a GET."""

_DIMENSIONS = rb"\)|%(i)s\x85\x94|%(i)s{2}\x86\x94|%(i)s{3}\x87\x94|\(%(i)s{4,64}t\x94" % {b"i": _INT}


def pattern_of(kind: str, gets: Mapping[tuple[bool, str], bytes]) -> tuple[Match, bytes]:
    """What recognizes a record of a kind, and the bytes it begins with.

    Args:
        kind: ``"chunk"``, ``"item"``, ``"tensor"`` or ``"write"``.
        gets: the opcodes that get a class (``True``) or a key by its name.

    Raises:
        KeyError: a name that it needs is not in the memo yet.
    """
    key = {name: re.escape(get) for (is_class, name), get in gets.items() if not is_class}
    cls = {name: re.escape(get) for (is_class, name), get in gets.items() if is_class}
    size = rb"(?:%b(%b)\x85\x94R\x94|(%b))" % (cls["Size"], _DIMENSIONS, _GET)
    begin = rb"\)\x81\x94}\x94\("
    index = b"".join(
        (cls["MetadataIndex"], begin, key["fqn"], _TEXT, key["index"], rb"(?:N|%b)" % _INT,
         rb"(?:%b%b)?ub" % (key["offset"], size))
    ) if kind in ("item", "write") else b""  # fmt: skip
    if kind == "chunk":
        head = gets[True, "ChunkStorageMetadata"]
        pattern = b"".join((re.escape(head), begin, key["offsets"], size, key["sizes"], size, b"ub"))
    elif kind == "item":
        head = gets[True, "MetadataIndex"]
        transforms = rb"(?:%b\]\x94%ba)?" % (key.get("transform_descriptors", rb"\0"), _TEXT)
        info = (cls["_StorageInfo"], begin, key["relative_path"], _TEXT, key["offset"], b"(%b)" % _INT)
        pattern = b"".join((index, *info, key["length"], b"(%b)" % _INT, transforms, b"ub"))
    elif kind == "tensor":
        head = b""
        properties = rb"%b\)\x81\x94\((%b)(%b)([\x88\x89])(%b)[\x88\x89]t\x94b" % (
            cls["TensorProperties"], _GET, _GET, _GET,
        )  # fmt: skip
        metadata = (cls["TensorStorageMetadata"], begin, key["properties"], properties, key["size"], size)
        nothing = rb"(%b\)\x81\x94)" % cls.get("BytesStorageMetadata", rb"\0")
        pattern = b"".join((_TEXT, rb"(?:", nothing, rb"|", *metadata, key["chunks"], rb"\]\x94)"))
    else:
        head = gets[True, "WriteItem"]
        properties = rb"(?:(%b)\)\x81\x94\((%b)(%b)[\x88\x89](%b)[\x88\x89]t\x94b|(%b))" % (
            cls["TensorProperties"], _GET, _GET, _GET, _GET,
        )  # fmt: skip
        chunk = (cls["ChunkStorageMetadata"], begin, key["offsets"], size, key["sizes"], size, b"ub")
        written = (cls["TensorWriteData"], begin, key["chunk"], rb"(?:(", *chunk, rb")|(%b))" % _GET)
        tensor = (*written, key["properties"], properties, key["size"], size, b"ub")
        pattern = b"".join(
            (re.escape(head), begin, key["index"], index, key["type"], b"(%b)" % _GET, key["bytes_io_data"], b"N",
             key["tensor_data"], rb"(?:N|(", *tensor, b"))ub")
        )  # fmt: skip
    return re.compile(pattern, re.DOTALL).match, head


def spelled(index: int) -> bytes:
    """The GET of a memo entry, as picklers spell it."""
    return b"h" + bytes((index,)) if index < 256 else b"j" + index.to_bytes(4, "little")


def index_of(get: bytes) -> int:
    """The memo entry that a BINGET or LONG_BINGET gets."""
    return get[1] if get[0] == 0x68 else int.from_bytes(get[1:], "little")


def puts_of(dimensions: bytes | None) -> int:
    """PUTs of a size: of the numbers (an empty tuple has none), of the arguments, of the size."""
    return 0 if dimensions is None else 3 if len(dimensions) > 1 else 2


def number_of(raw: bytes) -> int:
    """The number that BININT1, BININT2, BININT or LONG1 pushes."""
    op = raw[0]
    if op == 0x4B:
        return raw[1]
    if op == 0x4D:
        return raw[1] | raw[2] << 8
    return int.from_bytes(raw[1 if op == 0x4A else 2 :], "little", signed=True)
