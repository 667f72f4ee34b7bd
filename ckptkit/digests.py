r"""Content digests: the same for the same tensors in any container.

Version 1, exactly, so that anybody can compute it with a SHA-256 and a JSON writer:

- A **tensor's digest** is ``sha256:`` and the 64 lowercase hexadecimal digits of the SHA-256 of its values:
  contiguous, in C order, little-endian, with conjugate and negative bits carried out; nothing before, between or
  after them.  ``hashlib.sha256(tensor.contiguous().numpy().tobytes())`` is the same on a little-endian machine.
- A **content digest** is ``sha256:`` and the SHA-256 of these lines, each of ASCII and ended by ``\n``:
  first ``ckptkit-content-1``; then one for each tensor, sorted by name (by code points), which is the JSON text
  (no spaces, non-ASCII escaped as ``\uXXXX``) of ``[name,dtype,[sizes],digest]``:
  ``["fc.bias","float32",[10],"sha256:…"]``.
- **Names** are those of the selected state_dict, each without wrappers (`ckptkit.normalize.wrappers`: leading
  ``module`` and ``_orig_mod`` segments, and ``_orig_mod`` anywhere but last).  Where that would give two the same
  name, all of the file's stay as they are.  A file without a selected state_dict has all its tensors, named by the
  path of their section, a dot and their name in it.
- **Dtypes** are torch's names without ``torch.``.
- A value of a state_dict that is **no plain tensor** (``_extra_state``, a quantized or sparse tensor) has a line
  too, at its place in the order, with its kind in place of a dtype and the tensors it consists of in place of
  sizes: ``[name,kind,[[dtype,[sizes],digest],…],null]``.  The kind is the qualified name of its class, or of the
  function that makes it, or Python's name of a plain type.  That it goes away, or that a tensor in it changes, is
  thus noticed; numbers and text in it are not looked at.

Order, wrappers, container, devices, strides, ties, requires_grad, module versions, metadata and everything beside the
weights have no part in it.  A file without any tensor has no content digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptkit.checkpoint import TensorEntry
from ckptkit.normalize.wrappers import unwrapped_in_digests
from ckptkit.pickling.inert import Global, InertDict, InertSet, Object
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.values import stream

__all__ = ["PREFIX", "Line", "content_digest", "kind_of", "tensor_digest", "told", "unwrapped_names"]

PREFIX = "sha256:"
"""Before the hexadecimal digits."""

_FIRST = b"ckptkit-content-1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What goes into a content digest for one name.

    Attributes:
        name: without wrappers.
        kind: the dtype, or what the value is that is not a plain tensor.
        shape: the tensor's sizes; ``None``: it is not a plain tensor.
        digest: the tensor's; ``None``: it is none.
        parts: dtype, shape and digest of each tensor in a value that is none itself.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    digest: str | None = None
    parts: tuple[tuple[str, tuple[int, ...], str], ...] = ()


def told(digest: bytes) -> str:
    """A SHA-256 as it is written: ``"sha256:…"``."""
    return PREFIX + digest.hex()


def tensor_digest(entry: TensorEntry, checksums: Checksums | None = None) -> str:
    """The digest of a tensor's values, read in bounded pieces.

    Args:
        entry: the tensor.
        checksums: what sums the bytes as they pass by.

    Raises:
        DTypeError, CorruptError, FileAccessError: as `ckptkit.transfer.stream`.
    """
    digest = hashlib.sha256()
    for chunk in stream(entry) if checksums is None else checksums.along(entry, stream(entry)):
        digest.update(chunk)
    return told(digest.digest())


def content_digest(lines: Iterable[Line]) -> str | None:
    """The digest of everything named; ``None``: there is nothing."""
    ordered = sorted(lines, key=lambda line: line.name)
    if not ordered:
        return None
    digest = hashlib.sha256(_FIRST)
    for line in ordered:
        middle = line.parts if line.shape is None else line.shape
        digest.update(json.dumps([line.name, line.kind, middle, line.digest], separators=(",", ":")).encode() + b"\n")
    return told(digest.digest())


def kind_of(value: object) -> str:
    """What a value is that is not a plain tensor: a class, or a function that makes it."""
    if isinstance(value, Object):
        return value.class_name
    if isinstance(value, Global):
        return value.qualified
    if isinstance(value, (InertDict, InertSet)):
        return "dict" if isinstance(value, InertDict) else "set"
    return type(value).__name__


def unwrapped_names(names: Sequence[str]) -> list[str]:
    """The names without wrappers, in the same order; as they are, where two would become one."""
    bare = [unwrapped_in_digests(name) for name in names]
    return bare if len(set(bare)) == len(bare) else list(names)
