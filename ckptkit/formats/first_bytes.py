"""What a file is that is no checkpoint, by its first bytes, and what to do about it."""

from __future__ import annotations

import codecs
import re

__all__ = ["describe"]

_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""LONG1 0x1950a86a20f9469cfc6c and STOP: the first pickle of a file before torch 1.6."""

_SIGNATURES = (
    (b"\x1f\x8b", "gzip-compressed; decompress it first (gunzip)"),
    (b"\xfd7zXZ\x00", "xz-compressed; decompress it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; decompress it first (unzstd)"),
    (b"BZh", "bzip2-compressed; decompress it first (bunzip2)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras weights?), no torch checkpoint"),
    (b"GGUF", "a GGUF file (llama.cpp), no torch checkpoint"),
    (b"\x93NUMPY", "a numpy array (.npy), no torch checkpoint"),
    (b"PK\x05\x06", "an empty zip archive"),
)


def describe(head: bytes, size: int) -> str:
    """One sentence: what the file is, and the remedy where there is one.

    Args:
        head: its first bytes.
        size: of the whole file, in bytes.
    """
    if size == 0:
        return "the file is empty (0 bytes): an interrupted download or save; get it again"
    if head.startswith(b"version https://git-lfs.github.com/"):
        return _lfs_pointer(head)
    if b"".join(head.lstrip()[:15].lower().split()).startswith((b"<!doctypehtml", b"<html")):
        return "an HTML page, not a checkpoint: the download got an error or login page; check the address"
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    if re.match(rb"\x80[\x02-\x05]", head):
        if _LEGACY_MAGIC in head[:64]:  # a frame may come before it
            return (
                "a torch checkpoint of the legacy format (before torch 1.6), which this version does not read; "
                "torch.load and torch.save rewrite it"
            )
        return "a Python pickle, but not one torch.save wrote"
    if head[257:262] == b"ustar":
        return "a tar archive; torch's own tar format (0.1.x) is not read by this version, others must be unpacked"
    if _is_text(head):
        return f"a text file, not a checkpoint; it begins with {head[:40]!r}"
    return f"no known checkpoint container; it begins with the bytes {head[:8].hex(' ')}"


def _lfs_pointer(head: bytes) -> str:
    size = re.search(rb"^size (\d{1,19})$", head, re.MULTILINE)
    digest = re.search(rb"^oid sha256:([0-9a-f]{64})$", head, re.MULTILINE)
    facts = f" of {int(size[1]):,} bytes" if size else ""
    facts += f" (sha256 {digest[1].decode()})" if digest else ""
    return f"a git-lfs pointer, not the file{facts} it stands for; run: git lfs pull"


def _is_text(head: bytes) -> bool:
    """Whether the bytes are UTF-8 without control characters; the last character may be cut."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(head)
    except UnicodeDecodeError:
        return False
    return all(c >= " " or c in "\t\n\r\f" for c in text)
