"""The kind of a file that is not a checkpoint, by its first bytes, and what to do about it.

Sources beside those named below: the magic numbers of each format's own specification; for ONNX, TensorFlow
and Core ML, which have none, the first fields of their protobuf messages (``onnx.proto`` ``ModelProto``,
``saved_model.proto``, ``graph.proto``, ``Model.proto``).
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Iterator

from ckptkit.errors import UnknownFormatError
from ckptkit.formats.format import Probe
from ckptkit.formats.magic import OPAQUE
from ckptkit.formats.refused_contents import describe_pickle, describe_text, describe_zip, is_pickle
from ckptkit.formats.tar_archive import is_header
from ckptkit.formats.truncated import unfinished
from ckptkit.formats.unpacked import packing_of
from ckptkit.formats.zip_records import END, END64, LOCATOR
from ckptkit.report import count_of

__all__ = ["kind_of_file", "unknown"]

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    *((0, signature, what) for signature, what in OPAQUE.items()),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras weights, .h5), not a torch checkpoint; h5py reads it"),
    (4, b"TFL3", "a TensorFlow Lite model (.tflite), not a torch checkpoint"),
    (4, b"ET12", "an ExecuTorch program (.pte): compiled for a device; convert the checkpoint it was exported from"),
    (
        4,
        b"PTMF",
        "a TorchScript program for mobile as a flatbuffer (.ptl, .ff), which ckptkit does not read; torch.jit.load "
        "does, but it loads the program, so use it only on a file you trust, or convert the checkpoint it was made "
        "from",
    ),
    (0, b"\x93NUMPY", "a numpy array (.npy), not a torch checkpoint; numpy.load reads it"),
    (0, b"lmgg", "a GGML file (llama.cpp before GGUF), not a torch checkpoint"),
    (0, b"fmgg", "a GGML file (llama.cpp before GGUF), not a torch checkpoint"),
    (0, b"tjgg", "a GGML file (llama.cpp before GGUF), not a torch checkpoint"),
    (
        0,
        b"\x7fELF",
        "a program or library for Linux (ELF), not a checkpoint; do not run it if you expected a checkpoint",
    ),
    (0, b"MZ", "a program or library for Windows (PE), not a checkpoint; do not run it if you expected a checkpoint"),
    (0, b"\xcf\xfa\xed\xfe", "a program or library for macOS (Mach-O), not a checkpoint; do not run it"),
    (0, b"%PDF-", "a PDF document, not a checkpoint"),
    (0, b"\x89PNG\r\n", "a PNG image, not a checkpoint"),
    (0, b"\xff\xd8\xff", "a JPEG image, not a checkpoint"),
    (0, b"GIF8", "a GIF image, not a checkpoint"),
    (0, b"RIFF", "a RIFF file (WebP, WAV, AVI), not a checkpoint"),
    (0, b"SQLite format 3\x00", "an SQLite database, not a checkpoint"),
    (0, b"PAR1", "a Parquet table, not a checkpoint"),
    (0, b"ARROW1", "an Arrow table, not a checkpoint"),
)

_LUA_CLASS = re.compile(
    rb"\x04\0{3}[\x01-\xff]\0{3}\x03\0{3}V \d[\x01-\x50]\0{3}([A-Za-z_][\w.]*)|"
    rb"4\n\d+\n3\nV \d\n\d+\n([A-Za-z_][\w.]*)\n"
)
_LUA_TABLE = re.compile(rb"\x03\0{3}\x01\0{3}.{2}\0{2}[\x01\x02]\0{3}|3\n1\n\d+\n[12]\n", re.DOTALL)
_CTRANSLATE = re.compile(rb"[\x02-\x20]\0{3}([\x02-\x60]\0)([A-Z]\w*)\0", re.ASCII)

_TORCHSHARP_NBYTES = {0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 11: 1, 15: 2}
"""Element sizes by TorchSharp's numbers of dtypes, which are ``c10::ScalarType``'s."""

_WIDE_NBYTES = END64.size + LOCATOR.size

_SAMPLES = 64
"""Positions that are examined in a file that begins with zeros: enough to recognize one that is nothing else."""

_SAMPLE_NBYTES = 64 << 10


_RECORDS = frozenset({"data.pkl", "constants.pkl", "bytecode.pkl", "mobile_debug_handles.pkl", "traced_inputs.pkl"})
"""Pickles among the records of torch archives."""


def unknown(probe: Probe) -> UnknownFormatError:
    """The error for a file that no container claims: what it is, and the remedy if there is one."""
    error = UnknownFormatError(_describe(probe) + unfinished(probe.file.path))
    if is_pickle(probe):
        message, error.globals = describe_pickle(probe)
        folder, name = probe.file.folder, os.path.basename(probe.file.path)
        packing = packing_of(folder) if folder is not None and name in _RECORDS else None
        error.message = f"a record of {packing}" if packing else message + unfinished(probe.file.path)
        error.args = (error.message,)
    return error


def _describe(probe: Probe) -> str:
    head, size = probe.head, probe.file.size
    if size == 0:
        return "the file is empty (0 bytes): an interrupted download or save; download it again"
    if not any(head):
        return _zeros(probe)
    if probe.records is not None:
        return describe_zip(probe.records)
    for offset, signature, what in _SIGNATURES:
        if head.startswith(signature, offset):
            return what
    if head.startswith(b"GGUF"):
        version = int.from_bytes(head[4:8], "little")
        return (
            f"a GGUF file, version {version} (llama.cpp), which ckptkit does not read; use the model it was made from"
        )
    words = _lua(head) or _ctranslate(head) or describe_text(probe) or _torchsharp(probe) or _protobuf(probe)
    words = words or _msgpack(head) or _cut_front(probe) or _safetensors(probe)
    return words or f"not a known checkpoint container; it begins with the bytes {head[:8].hex(' ')}"


_CONTROLS = bytes(byte for byte in range(0x20) if byte not in b"\t\n\r\f") + b"\x7f"
"""Bytes that no text has."""

_PAGE = re.compile(rb"\s*(?:<!doctype\s+html|<html|<head|<script|<!--)", re.IGNORECASE)


def kind_of_file(probe: Probe) -> str:
    """The kind of a file that no container claims, in a word or two, by its first bytes only: for counting many.

    Among the kinds are ``"empty file"``, ``"zero-filled file"``, ``"git-lfs pointer"``, ``"HTML page"`` and ``"unknown
    file"``; pickles are recognized before.
    """
    head = probe.head
    if not head:
        return "empty file"
    if len(head.translate(None, _CONTROLS)) == len(head):
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
        except UnicodeDecodeError:
            pass
        else:
            return _kind_of_text(head)
    if not any(head):
        return "zero-filled file"
    if head.startswith(b"\x00\x05\x16\x07"):
        return "AppleDouble file"
    if probe.records is not None:
        return _first_words(describe_zip(probe.records))
    if is_header(head):
        return "tar archive"
    words = next((what for offset, signature, what in _SIGNATURES if head.startswith(signature, offset)), None)
    if words is None and head.startswith(b"GGUF"):
        words = "a GGUF file"
    words = words or _protobuf(probe) or _msgpack(head)
    return "unknown file" if words is None else _first_words(words)


def _kind_of_text(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "git-lfs pointer"
    if _PAGE.match(head):
        return "HTML page"
    return "JSON file" if head.lstrip(b" \t\r\n\xef\xbb\xbf")[:1] == b"{" else "text file"


def _first_words(sentence: str) -> str:
    """The thing that a sentence begins with, in the singular: ``"a PNG image, not a checkpoint"`` is a PNG image."""
    words = re.sub(r"^(?:an?|the) ", "", re.split(r"[,;:(]| for | with(?:out)? ", sentence, maxsplit=1)[0]).strip()
    return f"{words} file" if words.endswith("compressed") else words


def _zeros(probe: Probe) -> str:
    size = probe.file.size
    step = max(_SAMPLE_NBYTES, size // _SAMPLES)
    for start in range(0, size, step):
        piece = probe.file.read(start, min(_SAMPLE_NBYTES, size - start))
        if any(piece):
            return f"not a checkpoint: it begins with zeros up to about byte {start:,}; its beginning was never written"
    return (
        f"{size:,} bytes of zeros: space for the file was reserved but its content never arrived, as after an "
        "interrupted download; download it again"
    )


def _cut_front(probe: Probe) -> str | None:
    """A zip archive with something else before it, or without its beginning."""
    size = probe.file.size
    if size < END.size + _WIDE_NBYTES:
        return None
    tail = probe.file.read(size - END.size - _WIDE_NBYTES, END.size + _WIDE_NBYTES)
    signature, _, _, _, _, nbytes, offset, _ = END.unpack(tail[_WIDE_NBYTES:])
    if signature != b"PK\x05\x06":
        return None
    shift = size - END.size - nbytes - offset - (_WIDE_NBYTES if tail.startswith(b"PK\x06\x06") else 0)
    if shift > 0:
        return f"a zip archive with {count_of(shift, 'byte')} of something else before it; download it again"
    if shift < 0:
        return f"the end of a zip archive: its first {count_of(-shift, 'byte', 'is', 'are')} missing; download it again"
    return "a zip archive whose first bytes are damaged; download it again"


def _safetensors(probe: Probe) -> str | None:
    """A safetensors file whose header does not begin as it must."""
    head, size = probe.head, probe.file.size
    if os.path.splitext(probe.file.path)[1].lower() != ".safetensors":
        return None
    if size < 8:
        few = count_of(size, "byte", "is", "are")
        return f"named .safetensors, but {few} too few for the length of its header; download it again"
    nbytes = int.from_bytes(head[:8], "little")
    return (
        f"named .safetensors, but it is not one: its first 8 bytes say that {nbytes:,} bytes of header follow (the "
        f"file has {size:,}), and the header begins with {head[8:16]!r}, not with '{{'"
    )


# Formats without a magic number.


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    """The number that begins at a position, seven bits a byte (LEB128), and the position after it.

    Raises:
        IndexError: the bytes end in it, or it has more than 64 bits.
    """
    value = shift = 0
    while shift < 64:
        byte = data[pos]
        value, shift, pos = value | (byte & 0x7F) << shift, shift + 7, pos + 1
        if byte < 0x80:
            return value, pos
    raise IndexError


def _fields(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The fields of a protobuf message as far as the bytes reach: number, wire type, varint or length, content.

    The encoding is described in protobuf's "Encoding" guide.
    """
    pos = 0
    try:
        while pos < len(data):
            tag, pos = _varint(data, pos)
            kind = tag & 7
            if kind not in (0, 2) or tag >> 3 == 0:
                return
            value, pos = _varint(data, pos)
            content = data[pos : pos + value] if kind == 2 else b""
            yield tag >> 3, kind, value, content
            pos += len(content) if kind == 2 else 0
            if kind == 2 and len(content) < value:
                return
    except IndexError:
        return


def _protobuf(probe: Probe) -> str | None:
    fields = list(_fields(probe.head))
    if not fields:
        return None
    number, kind, value, content = fields[0]
    if (number, kind) == (1, 0) and 0 < value < 100 and len(fields) > 1:
        number, kind, length, content = fields[1]
        rest = {field[0] for field in fields[1:]}
        if (number, kind) == (2, 2) and content.isascii() and content.decode("ascii").isprintable() and content:
            return f"an ONNX model (IR version {value}, by {content[:40].decode('ascii')}), not a torch checkpoint"
        if kind == 2 and rest & {7, 8} and number in (3, 4, 7, 8):
            return f"an ONNX model (IR version {value}), not a torch checkpoint"
        if (number, kind) == (2, 2) and content.startswith(b"\n") and length <= probe.file.size:
            if probe.file.path.lower().endswith(".mlmodel") or value > 1:
                return f"a Core ML model (specification version {value}), not a torch checkpoint"
            return "a TensorFlow SavedModel (saved_model.pb), not a torch checkpoint"
    if (number, kind) == (1, 2) and content.startswith(b"\n"):
        inner = list(_fields(content))
        if len(inner) > 1 and inner[1][:2] == (2, 2) and re.fullmatch(rb"[A-Z][A-Za-z0-9]+", inner[1][3]):
            return "a frozen TensorFlow graph (GraphDef, .pb), not a torch checkpoint"
    return None


def _msgpack(head: bytes) -> str | None:
    """The map of short string keys that flax writes (the msgpack specification, "fixmap" and "map")."""
    key_at = 1 if 0x81 <= head[0] <= 0x8F else 3 if head[0] == 0xDE else 0
    if not key_at or len(head) <= key_at or not 0xA1 <= head[key_at] <= 0xBF:
        return None
    key = head[key_at + 1 : key_at + 1 + (head[key_at] & 0x1F)]
    if not key.isascii() or not key.decode("ascii").isprintable():
        return None
    return f"a msgpack document with the key {key.decode('ascii')!r} (flax weights?), not a torch checkpoint"


def _lua(head: bytes) -> str | None:
    """What Torch7 writes in Lua (``torch7/File.lua`` ``writeObject``).

    A type, an index; of classes the version ``V 1`` and the name.  Numbers have 4 bytes, in ASCII mode a line.
    """
    found = _LUA_CLASS.match(head)
    if found is None and not _LUA_TABLE.match(head):
        return None
    name = (found[1] or found[2])[:80].decode("ascii") if found else "table"
    return (
        f"a file of Torch7 for Lua (.t7) with a {name}, not a PyTorch checkpoint; in Python, the package torchfile "
        "reads it, and so does torch.utils.serialization.load_lua of torch 0.2 to 0.4"
    )


def _ctranslate(head: bytes) -> str | None:
    """A model of CTranslate2 (``python/ctranslate2/specs/model_spec.py`` ``_serialize``).

    A version (4 bytes), the name of its specification (2 bytes of length, text, a NUL), a revision.
    """
    found = _CTRANSLATE.match(head)
    if found is None or int.from_bytes(found[1], "little") != len(found[2]) + 1:
        return None
    return (
        f"a CTranslate2 model ({found[2].decode('ascii')}), not a torch checkpoint; ctranslate2 and faster-whisper "
        "read its folder. Use the model it was converted from"
    )


def _torchsharp(probe: Probe) -> str | None:
    """A state_dict as TorchSharp keeps it (``src/Python/exportsd.py`` ``save_state_dict``); all of it must fit.

    The number of tensors, then for each its name with its length, its type, the number of dimensions, the dimensions,
    and the bytes.
    """
    head, size = probe.head, probe.file.size
    try:
        count, pos = _varint(head, 0)
        nbytes, pos = _varint(head, pos)
        name, pos = head[pos : pos + nbytes], pos + nbytes
        kind, pos = _varint(head, pos)
        rank, pos = _varint(head, pos)
        shape = []
        for _ in range(rank if rank < 9 else 0):
            length, pos = _varint(head, pos)
            shape.append(length)
    except IndexError:
        return None
    itemsize = _TORCHSHARP_NBYTES.get(kind, 0)
    end = pos + itemsize * math.prod(shape)
    if not (0 < count <= size and rank < 9 and itemsize and re.fullmatch(rb"[A-Za-z_][\w.]*", name)):
        return None
    if end != size if count == 1 else end + 4 * (count - 1) > size:
        return None
    if count > 1:  # the next one's name
        behind = probe.file.read(end, min(256, size - end))
        if not behind or not re.fullmatch(rb"[A-Za-z_][\w.]*", behind[1 : 1 + min(behind[0], 127)]):
            return None
    return (
        f"a TorchSharp state_dict (.dat) of {count_of(count, 'tensor')}, the first {name[:80].decode('ascii')!r}, not "
        "a torch checkpoint; importsd.load_state_dict of TorchSharp's src/Python reads it"
    )
