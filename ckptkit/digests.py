r"""Content digests: the same for the same tensors in any container.

Version 1, exactly, so that anybody can compute it with a SHA-256 and a JSON writer:

- A **tensor's digest** is ``sha256:`` and the 64 lowercase hexadecimal digits of the SHA-256 of its values:
  contiguous, in C order, little-endian, with conjugate and negative bits carried out; nothing before, between or
  after them.  ``hashlib.sha256(tensor.contiguous().numpy().tobytes())`` is the same on a little-endian machine.
- A **content digest** is ``sha256:`` and the SHA-256 of these lines, each of ASCII and ended by ``\n``:
  first ``ckptkit-content-1``; then one for each tensor, sorted by name (by code points), which is the JSON text
  (no spaces, non-ASCII escaped as ``\uXXXX``) of ``[name,dtype,[sizes],digest]``:
  ``["fc.bias","float32",[10],"sha256:…"]``.
- **Names** are those of the selected state_dict, each without wrappers (`ckptkit.normalize.modules`: leading
  ``module`` and ``_orig_mod`` segments, and ``_orig_mod`` anywhere but last).  If two would then have the same name,
  all names of the file are used unchanged.  A file without a selected state_dict has all its tensors, named by the path
  of their section, a dot and their name in it.
- **Dtypes** are torch's names without ``torch.``.
- A value of a state_dict that is **no plain tensor** (``_extra_state``, a quantized or sparse tensor) has a line
  too, at its place in the order, with its kind in place of a dtype and the tensors it consists of in place of
  sizes: ``[name,kind,[[dtype,[sizes],digest],…],tree]``.  The kind is the qualified name of its class, of the function
  that makes it, or of its plain Python type; the tree is the digest of everything in the value, as in a whole digest:
  scales, zero points, axes, sizes, numbers and text.  A tensor of a custom class with attributes has their tree as a
  fifth value in its line.  With a tree the first line is ``ckptkit-content-2``.  Version 1 had ``null`` for
  each tree, and no fifth value; lock files that have it still hold.

Order, wrappers, container, devices, strides, ties, requires_grad, module versions, metadata and everything beside the
weights have no part in it.  A file without any tensor has no content digest.

A **whole digest** covers everything in the file: every tensor wherever it is, every value, key and class, calls made
for their effect, ties, and the container's own metadata.  It is ``sha256:`` and the SHA-256 of ``ckptkit-whole-1`` and
one line for each of ``["tree",digest]``, ``["metadata",[[key,value],…]]`` and ``["ties",[[name,…],…]]``.  A tree's
digest is that of `tree_digest`.  Saving again changes nothing: the order and names of records, their alignment and
times, keys and sharing of storages, strides, byte order, devices, the pickle's protocol and memo, and the order of
names of tensors do not count.  `ckptkit.differences` finds no difference between two files of one whole digest, with
``strict``.  Programs, and files with parts that are not read, have none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from ckptkit.checkpoint import STATE_DICT, Checkpoint, Storage, TensorEntry, tied_groups
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.content import PLAIN, content_of, plain_bytes
from ckptkit.normalize.modules import unwrapped_in_digests
from ckptkit.normalize.sections import is_plain_value
from ckptkit.normalize.trees import FLAGS
from ckptkit.pickling.inert import Global, InertDict, InertSet, Object, effects_of, tensors_in
from ckptkit.startup import dataclass, sha256
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.values import stream

__all__ = [
    "PREFIX",
    "DigestLine",
    "content_digest",
    "digest_text",
    "tensor_digest",
    "tree_digest",
    "unwrapped_names",
    "value_kind",
    "whole_digest",
    "whole_nodes",
]

PREFIX = "sha256:"
"""Before the hexadecimal digits."""

_FIRST, _WITH_TREES, _WHOLE = b"ckptkit-content-1\n", b"ckptkit-content-2\n", b"ckptkit-whole-1\n"

Values = Callable[[TensorEntry | Storage], str]
"""The digest of the values of a tensor, or of the bytes of a separate storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestLine:
    """What goes into a content digest for one name.

    Attributes:
        name: without wrappers.
        kind: the dtype, or what the value is if it is not a plain tensor.
        shape: the tensor's sizes; ``None``: it is not a plain tensor.
        digest: the tensor's; ``None``: it is not one.
        parts: dtype, shape and digest of each tensor in a value that is not a tensor itself.
        tree: the digest of everything in such a value, or of the attributes of a tensor of a custom class; ``None``: it
            is plain, or the line has version 1.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    digest: str | None = None
    parts: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    tree: str | None = None


def digest_text(digest: bytes) -> str:
    """A SHA-256 in text form: ``"sha256:…"``."""
    return PREFIX + digest.hex()


def tensor_digest(entry: TensorEntry, checksums: Checksums | None = None) -> str:
    """The digest of a tensor's values, read in bounded pieces.

    Args:
        entry: the tensor.
        checksums: what sums the bytes as they pass by.

    Raises:
        DTypeError, CorruptError, FileAccessError: as `ckptkit.transfer.stream`.
    """
    digest = sha256()
    for chunk in stream(entry) if checksums is None else checksums.along(entry, stream(entry)):
        digest.update(chunk)
    return digest_text(digest.digest())


def content_digest(lines: Iterable[DigestLine]) -> str | None:
    """The digest of everything named; ``None``: there is nothing."""
    ordered = sorted(lines, key=lambda line: line.name)
    if not ordered:
        return None
    digest = sha256(_WITH_TREES if any(line.tree is not None for line in ordered) else _FIRST)
    for line in ordered:
        middle = line.parts if line.shape is None else line.shape
        told_digests = [line.tree] if line.digest is None else [line.digest, line.tree][: 1 + (line.tree is not None)]
        digest.update(_json([line.name, line.kind, middle, *told_digests]))
    return digest_text(digest.digest())


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def whole_digest(checkpoint: Checkpoint, values: Values) -> str | None:
    """The digest of everything in a file; ``None``: it contains what is not read."""
    if checkpoint.origin.is_program or checkpoint.unvouched:
        return None
    root, weights = _whole(checkpoint)
    digest = sha256(_WHOLE)
    digest.update(_json(["tree", tree_digest(root, values, weights)]))
    digest.update(_json(["metadata", sorted(checkpoint.metadata.items())]))
    digest.update(_json(["ties", sorted(map(sorted, tied_groups(checkpoint.state_dict)))]))
    return digest_text(digest.digest())


def whole_nodes(checkpoint: Checkpoint) -> Iterator[TensorEntry | Storage]:
    """What `whole_digest` asks the values of beside the plain tensors of the state_dict: each once, whatever its names.

    Raises:
        LimitError: the tree has more nodes than that of any checkpoint.
    """
    known = {id(value) for value in checkpoint.state_dict.everything.values() if is_plain_value(value)}
    return tensors_in(_whole(checkpoint), known)


def _whole(checkpoint: Checkpoint) -> tuple[object, object]:
    """All of a file's tree but its weights, and the weights."""
    weights = lower_state_dict(checkpoint.state_dict) if checkpoint.module is None else checkpoint.module
    return (checkpoint.rest, checkpoint.discarded), weights


def tree_digest(root: object, values: Values, weights: object = STATE_DICT, *, flags: bool = True) -> str:
    """The digest of a tree: the same where `ckptkit.normalize.trees.SameContent` finds no difference.

    A node's digest is the SHA-256 of its kind and its parts, each with its length: plain values themselves, nodes by
    their digests.  Nodes that refer to each other are numbered in the order in which they are reached, and digested
    together; the way such a cycle is folded matters.

    Args:
        root: the tree; it may share nodes, contain cycles and be deep.
        values: the identity of tensors.
        weights: the node in the place of the marker `STATE_DICT`.
        flags: as for `SameContent`.
    """
    done: dict[int, bytes] = {}
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    rows: dict[int, list[object]] = {}
    waiting: list[object] = []
    stack: list[tuple[object, Iterator[object]]] = []

    def enter(node: object) -> bool:
        """Whether there is something below the node; else it is digested."""
        row = _row(weights if node is STATE_DICT else node, values, flags)
        below = [part for part in row if not isinstance(part, bytes)]
        if not below:
            _digest_group(node, {id(node)}, {id(node): row}, done)
            return False
        order[id(node)] = lowest[id(node)] = len(order)
        rows[id(node)] = row
        waiting.append(node)
        stack.append((node, iter(below)))
        return True

    enter(([root],))
    while True:  # Tarjan's search for nodes that lead to each other
        node, rest = stack[-1]
        for part in rest:
            if id(part) in done:
                continue
            if id(part) not in order:
                if enter(part):
                    break
                continue
            lowest[id(node)] = min(lowest[id(node)], order[id(part)])
        else:
            stack.pop()
            if lowest[id(node)] == order[id(node)]:
                group = {id(node)}
                while (member := waiting.pop()) is not node:
                    group.add(id(member))
                _digest_group(node, group, rows, done)
            if not stack:
                return digest_text(done[id(node)])
            above = id(stack[-1][0])
            lowest[above] = min(lowest[above], lowest[id(node)])


def _digest_group(first: object, group: set[int], rows: dict[int, list[object]], done: dict[int, bytes]) -> None:
    """Digest nodes that all lead to each other: most often it is one."""
    numbers = {id(first): 0}
    queue = [id(first)]
    digest = sha256()
    for key in queue:
        row = rows.pop(key)
        digest.update(b"%d\n" % len(row))
        for part in row:
            if isinstance(part, bytes):
                text = part
            elif id(part) in group:
                if id(part) not in numbers:
                    numbers[id(part)] = len(numbers)
                    queue.append(id(part))
                text = b"number %d" % numbers[id(part)]
            else:
                text = b"digest " + done[id(part)]
            digest.update(b"%d:" % len(text))
            digest.update(text)
    for key, number in numbers.items():
        done[key] = sha256(digest.digest() + b"%d" % number).digest() if number else digest.digest()


def _row(node: object, values: Values, flags: bool) -> list[object]:
    """The parts of a node: its kind, consecutive plain values as one text, others themselves."""
    pairs: list[tuple[object, object]] = []
    if isinstance(node, TensorEntry):
        told_flags = [getattr(node, name) for name in FLAGS] if flags else []
        hanging = (node.subclass, node.attributes)
        there = [part is not None for part in hanging]
        kind = f"tensor {node.dtype} {[*node.shape]} {told_flags} {values(node)} {there}"
        parts = [*(part for part in hanging if part is not None), *effects_of(node)]
    elif isinstance(node, Storage):
        kind, parts = f"storage {node.dtype} {node.nbytes} {node.byteorder} {values(node)}", []
    else:
        kind, parts, pairs = content_of(node)
    row: list[object] = [f"{kind} {len(parts)} {len(pairs)}".encode("utf-8", "surrogatepass")]
    plain: list[bytes] = []
    for part in (*parts, *(part for pair in pairs for part in pair)):
        if isinstance(part, PLAIN):
            text = plain_bytes(part)
            plain.append(b"%d:%b" % (len(text), text))
            continue
        if plain:
            row.append(b"plain " + b"".join(plain))
            plain.clear()
        row.append(part)
    return [*row, b"plain " + b"".join(plain)] if plain else row


def value_kind(value: object) -> str:
    """The kind of a value that is not a plain tensor: a class, or a function that makes it."""
    if isinstance(value, Object):
        return value.class_name
    if isinstance(value, Global):
        return value.qualified
    if isinstance(value, (InertDict, InertSet)):
        return "dict" if isinstance(value, InertDict) else "set"
    return type(value).__name__


def unwrapped_names(names: Sequence[str]) -> list[str]:
    """The names without wrappers, in the same order; unchanged if two would be equal."""
    bare = [unwrapped_in_digests(name) for name in names]
    return bare if len(set(bare)) == len(bare) else list(names)
