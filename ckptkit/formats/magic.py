"""What bytes are, by the first of them: a pickle, compressed, an archive that is not read, code for a machine.

A pickle need not declare itself.  CPython's unpicklers (``Lib/pickle.py``, ``Modules/_pickle.c``) accept any opcode
that needs nothing on the stack as the first one, and an attacker can choose it.  Many of these opcodes are letters, so
a text can begin like a pickle: it is one where it comes to an end, or to a call, before the first byte that no
unpickler takes.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CorruptError, FormatError, LimitError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.inert import Global
from ckptkit.pickling.machine import LOADER
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.trust import global_uses

__all__ = [
    "DECLARED", "FIRST", "OPAQUE", "PADDING", "SCANNED_NBYTES", "PickleGuess", "attempts", "guess_pickle",
    "is_compiled", "is_plain_pickle", "opaque", "passes_over", "runs", "scanned",
]  # fmt: skip

PickleGuess = str | None
"""``"pickle"``; ``"maybe"``: the first bytes do not decide; ``None``: it is not one."""

_WORD = rb"[A-Za-z_\x80-\xff][^\n\0 ]*"
_SPACE = rb"[ \t\r\v\f]*"

FIRST = re.compile(
    rb"[(\]})NKMJGTUXBCV\x82-\x84\x88-\x8f\x95-\x97]|\x80[\x00-\x05]|S['\"]|I\n|P(?!K\x03\x04)"
    rb"|c" + _WORD + rb"(?:\Z|\n(?:\Z|[A-Za-z_\x80-\xff]))"
    rb"|[IL]" + _SPACE + rb"[+-]?[0-9]\w*" + _SPACE + rb"(?:\n|\Z)"
    rb"|F" + _SPACE + rb"[+-]?(?:[0-9.][0-9.eE_+-]*|(?i:inf(?:inity)?|nan))" + _SPACE + rb"(?:\n|\Z)"
)  # fmt: skip
"""How a pickle can begin: opcodes that take nothing from the stack, with an argument that some unpickler takes."""

DECLARED = re.compile(rb"\x80[\x00-\x05](?:\Z|" + FIRST.pattern + rb")")
"""A pickle that says so: PROTO, with which they begin since protocol 2, and an opcode that may follow it."""

_NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")

_MODULE = re.compile(rb"[ci]([A-Za-z_][\w.]{0,100})\Z")
_ATTRIBUTE = re.compile(rb"\n(?=([A-Za-z_][\w.]{0,100})\n)")
_TEXT = rb"(?:\x8c[\x01-\x64]|X[\x01-\x64]\0\0\0)([A-Za-z_][\w.]{0,99})(?:\x94|q.|r....|p[0-9]+\n)?"
_STACK_GLOBAL = re.compile(_TEXT + _TEXT + rb"\x93", re.DOTALL)
"""Names in the bytes of a pickle that cannot be read to its end (protocol 0 to 3, and 4 on)."""

_STORAGE = re.compile(
    rb"_load_from_bytes.{1,80}(?:l\xfc\x9cF\xf9 j\xa8P\x19|l\xc3\xbc\xc2\x9cF\xc3\xb9 j\xc2\xa8P\x19)", re.DOTALL
)
"""Where a plain pickle has a storage in a file of torch before 1.6, as bytes or as text; its names are in it."""

_NAME_NBYTES = 102

SCANNED_NBYTES = 8 << 20
"""Bytes that are searched for names if the pickle cannot be read."""

_CALL_OPCODES = 1000
"""Opcodes that are searched for the call of a name."""

_PLAIN = re.compile(
    rb"(?:K.|M..|J....|q.|h.|r....|j....|[N()t\]}aelsud0R\x85-\x89\x94]|ctorch\.jit\._pickle\nbuild_[a-z]+\n){0,1000}",
    re.DOTALL,
)
"""Opcodes of numbers and containers, and what TorchScript's own unpickler makes lists of."""

PADDING = b"\0 \t\r\n"
"""Bytes that may follow a pickle and are not part of one."""

OPAQUE: dict[bytes, str] = {
    b"\x1f\x8b": "gzip-compressed; decompress it first (gunzip, or tar -xzf for a .tar.gz)",
    b"\xfd7zXZ\x00": "xz-compressed; decompress it first (unxz)",
    b"\x5d\x00\x00": "lzma-compressed, it seems; decompress it first (unlzma)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it first (unzstd)",
    b"\x04\x22\x4d\x18": "lz4-compressed; decompress it first (unlz4)",
    b"BZh": "bzip2-compressed; decompress it first (bunzip2)",
    b"LZIP": "lzip-compressed; decompress it first (lzip -d)",
    b"\x1f\x9d": "LZW-compressed; decompress it first (uncompress)",
    b"\x00\x01BLOSC": "blosc-compressed; decompress it first",
    b"\xff\x06\x00\x00sNaPpY": "snappy-compressed; decompress it first",
    b"ZF0x": "zlib-compressed by an old joblib; joblib.load reads it, and runs the functions it names",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!\x1a\x07": "a RAR archive; unpack it first",
    b"PK\x07\x08": "one part of a multi-volume zip archive; join them first",
    b"!<arch>\n": "an ar archive (a static library, a Debian package); unpack it first (ar x)",
    b"MSCF\x00": "a cabinet archive; unpack it first",
    b"070701": "a cpio archive; unpack it first",
    b"hsqs": "a SquashFS image; unpack it first",
}
"""Files that may contain pickles and are not read, by their first bytes: what they are, and what to do."""

_IS_OPAQUE = re.compile(b"|".join(map(re.escape, OPAQUE)))

_COMPILED = re.compile(
    rb"\x7fELF|MZ\x90\0|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\xbe\xba\xfe\xca|!<arch>\n"
    rb"|\0asm|BC\xc0\xde|\xde\xc0\x17\x0b|\x50\xed\x55\xba|\x03\x02\x23\x07|\x07\x23\x02\x03|MTLB|dex\n"
    rb"|__CLANG_OFFLOAD_BUNDLE__|.{4}ET1[0-9]|.{2}\r\n\0\0\0\0|(?:\s|//[^\n]*\n)*\.version\s+[0-9]+\.[0-9]+\s*\.target\s",
    re.DOTALL,
)
"""ELF (with ``.cubin`` and ``.hsaco``), PE, Mach-O and Java, a static library, WebAssembly, LLVM's bitcode, CUDA's fat
binaries, SPIR-V, Metal, Android, offload bundles, ExecuTorch, Python's bytecode, PTX."""

_COMPILED_NAME = re.compile(
    r".*\.(?:so(?:\.[0-9]+)*|dylib|dll|pyd|exe|cubin|fatbin|hsaco|ptx|metallib|spv|wasm|pte|pyc)",
    re.IGNORECASE,
)


def opaque(head: bytes) -> str | None:
    """The kind of file that may contain pickles and cannot be read; ``None``: it can, or is not a container."""
    found = _IS_OPAQUE.match(head)
    if found is not None:
        return OPAQUE[found[0]].partition(";")[0]
    if head[:1] == b"\x78" and len(head) > 1 and int.from_bytes(head[:2], "big") % 31 == 0:  # RFC 1950
        try:
            zlib.decompressobj().decompress(head, 1)
        except zlib.error:
            return None
        return "zlib-compressed"
    return None


def is_compiled(head: bytes, name: str) -> bool:
    """Whether it is code compiled for a machine, by its magic number or by its name."""
    return _COMPILED.match(head) is not None or _COMPILED_NAME.fullmatch(name) is not None


def guess_pickle(head: bytes, size: int) -> PickleGuess:
    """Whether a file is a pickle, by its first bytes.

    Args:
        head: the first `ckptkit.formats.format.HEAD_NBYTES`, or all there are.
        size: of the file, in bytes.
    """
    if DECLARED.match(head):
        return "pickle"
    if FIRST.match(head) is None:
        return None
    wanted = False

    def more(nbytes: int) -> bytes:
        nonlocal wanted
        wanted = nbytes < size
        return b""

    try:
        pickle = read_pickle(head, more=more)
    except FormatError as error:
        if wanted or passes_over(error, head, size):
            return "maybe"
        return "pickle" if error.called or any(map(runs, error.globals)) else None
    if pickle.end == size:
        return "pickle"
    is_open = pickle.globals or FIRST.match(head, pickle.end) or not head[pickle.end :].strip(PADDING)
    return "maybe" if is_open else None


def is_plain_pickle(data: bytes) -> bool:
    """Whether it is one pickle of protocol 2 of numbers, texts and containers.

    TorchScript keeps thousands of such texts for debugging: scanning from text to text takes a tenth of the time that
    reading them does.
    """
    at, before = 2, 0
    while at > before:
        before = at
        found = _PLAIN.match(data, at)
        at = found.end() if found is not None else at
        if data[at : at + 1] == b"X":
            at += 5 + int.from_bytes(data[at + 1 : at + 5], "little")
    return at == len(data) - 1 and data.endswith(b".")


def passes_over(error: FormatError, data: bytes, size: int, start: int = 0) -> bool:
    """Whether some unpickler may continue where a pickle could not be read further.

    The error's type shows whether a pickle was refused without being damaged.  Besides, CPython accepts lines of any
    length, its Python unpickler a truncated frame, and after a STOP a reader of one pickle may read another.

    Args:
        error: of `read_pickle`.
        data: the first bytes, from ``start`` on.
        size: how many there are.
        start: the position that the error's offset counts from.
    """
    at = max(0, (error.offset or 0) - start)
    if data[at : at + 1] == b"\x8b":  # LONG4, whose bytes must be there
        return 0 <= int.from_bytes(data[at + 1 : at + 5], "little", signed=True) <= size - at
    return type(error) is not CorruptError or data[at : at + 1] in (b".", b"\x95", b"c", b"I", b"L", b"F", b"p", b"g")


def attempts(data: bytes) -> Iterator[bool]:
    """For each name somewhere in the data, whether it is called there."""
    limits = DEFAULT_LIMITS._replace(opcodes=_CALL_OPCODES)
    starts = (found.start() for found in _STACK_GLOBAL.finditer(data))
    for start in chain((start for start, _, _ in _text_names(data)), starts):
        try:
            pickle = read_pickle(data, start=start, limits=limits)
        except FormatError as error:
            yield error.called or isinstance(error, LimitError)
        else:
            yield any(name.calls for name in pickle.globals)


def _text_names(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The names that are in the data as protocol 0 to 3 write them: where, module, attribute."""
    for found in _ATTRIBUTE.finditer(data):
        tail = data[max(0, found.start() - _NAME_NBYTES) : found.start()]
        module = _MODULE.search(tail)
        if module is not None:
            yield found.start() - len(tail) + module.start(), module[1], found[1]


def scanned(data: bytes, known: Iterable[GlobalUse] = ()) -> tuple[GlobalUse, ...]:
    """The names that are in the bytes of a pickle, found without reading it.

    Args:
        data: the bytes.
        known: names that were found by reading it as far as that goes; they are judged by what they are given.
    """
    found = Counter(_STACK_GLOBAL.findall(data))
    hidden: set[tuple[bytes, bytes]] = set()
    for _, module, name in _text_names(data):
        found[module, name] += 1
        # The bytes before it may look like its beginning.
        hidden.update((module[at + 1 :], name) for at in range(len(module) - 1) if module[at] in b"ci")
    judged = {use.name for use in known}

    def uses(names: Iterable[tuple[tuple[bytes, bytes], int]]) -> tuple[GlobalUse, ...]:
        made = []
        for (module, name), count in names:
            node = Global(module.decode("ascii", "replace"), name.decode("ascii", "replace"))
            if node.qualified not in judged:
                node.calls = count
                node.excused = len(_STORAGE.findall(data)) if (node.module, node.name) == LOADER else 0
                made.append(node)
        return global_uses(made)

    return uses(found.items()) + tuple(filter(runs, uses((both, 1) for both in hidden - found.keys())))


def runs(use: GlobalUse) -> bool:
    """Whether what was read of a text as a pickle is a name that runs something."""
    return use.verdict == "dangerous" and _NAME.fullmatch(use.name) is not None
