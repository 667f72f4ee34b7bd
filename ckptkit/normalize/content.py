"""The meaning of the nodes of an inert tree, however they are pickled: the facts that are compared and digested.

Python pickles one thing in several ways, depending on the protocol: sets and bytes by a call or an opcode, nested
classes by ``getattr`` or a dotted name, objects by ``copyreg._reconstructor`` or NEWOBJ, names of the standard library
as Python 2 had them, numpy's arrays as ``_reconstruct`` or ``_frombuffer`` (`Lib/pickle.py`, `Lib/copyreg.py`,
`Lib/_compat_pickle.py`, numpy's ``array_reduce_ex``).  Here each has one form.  A call that was given anything beyond
what Python itself writes keeps the form it has.

`form_of` is a node's form, one level deep; `content_of` the same for digests (`ckptkit.digests`).
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Sequence
from typing import Final, NamedTuple

from ckptkit.checkpoint import TensorEntry
from ckptkit.pickling.arrays import parts_of
from ckptkit.pickling.inert import (
    ABSENT,
    SCALARS,
    Global,
    InertDict,
    InertSet,
    Object,
    PersistentId,
    effects_of,
    mapping_items,
)

__all__ = [
    "HERE",
    "PLAIN",
    "Form",
    "content_of",
    "form_of",
    "is_ordered",
    "meant",
    "plain_bytes",
    "token_of",
]

HERE: Final = object()
"""Label of what has the place of the node that it is a part of."""

PLAIN = (*SCALARS, bytearray, type(ABSENT))
"""Types of what has no parts."""


class Form(NamedTuple):
    """A node by its meaning: its kind, its parts with their labels, and its pairs if it is a mapping."""

    kind: str
    parts: Sequence[tuple[object, object]] = ()
    pairs: list[tuple[object, object]] = []  # noqa: RUF012 - never changed

    def may_be(self, other: Form) -> bool:
        """Whether parts of the two correspond although their kinds differ: a list for a tuple."""
        labels = [label for label, _ in self.parts]
        return bool(self.pairs and other.pairs) or (bool(labels) and labels == [label for label, _ in other.parts])


def form_of(node: object) -> Form:
    """The kind of a node that is not a tensor, storage or plain value."""
    form, effects = _own_form(node), effects_of(node)
    if not effects:
        return form
    parts = [*form.parts, *((HERE, call) for call in effects)]
    return form._replace(kind=f"{form.kind} with {len(effects)}", parts=parts)


def _own_form(node: object) -> Form:
    if isinstance(node, (list, tuple)):
        return Form(type(node).__name__, list(enumerate(node)))
    if isinstance(node, InertDict):
        return Form("dict", (), node.pairs)
    if isinstance(node, InertSet):
        return _set(node.frozen, node.members)
    if isinstance(node, Global):
        return Form(f"name {_name(node, ':')}")
    if isinstance(node, PersistentId):
        return Form("persistent id", [(HERE, node.pid)])
    return _object(node) if isinstance(node, Object) else Form(repr(node))


def _set(frozen: bool, members: Sequence[object]) -> Form:
    """Members in a canonical order, because the file's changes from run to run."""
    tokens = [token_of(member) for member in members]
    if None not in tokens:
        members = [member for _, member in sorted(zip(tokens, members, strict=True), key=lambda pair: pair[0] or b"")]
    return Form("frozenset" if frozen else "set", [(HERE, member) for member in members])


def _object(node: Object) -> Form:
    how, cls, args = node.how, node.cls, node.args
    name = _name(cls) if isinstance(cls, Global) else ""
    if name == "copyreg._reconstructor" and len(args) == 3 and _is_object(args[1]) and args[2] is None:
        how, cls, args = "newobj", args[0], ()  # of protocols 0 and 1
    elif name == "copyreg.__newobj__" and args:
        how, cls, args = "newobj", args[0], args[1:]
    elif (known := _known_call(node, name, is_call=_is_call(node))) is not None:
        return known
    pairs = mapping_items(node)
    if pairs is not None and args and isinstance(args[-1], (list, InertDict)):
        args = args[:-1]  # it is among the pairs
    state = node.state if isinstance(node.state, tuple) and len(node.state) == 2 else (node.state,)
    inner = ([] if isinstance(cls, Global) else [cls], args, (node.kwargs,), state)
    parts = [(HERE, part) for each in inner for part in each]
    name = _name(cls, ":") if isinstance(cls, Global) else "?"
    kind = f"{how} {name} {[len(each) for each in inner]} {len(node.items)}"
    return Form(kind, [*parts, *enumerate(node.items)], node.pairs if pairs is None else pairs)


def _known_call(node: Object, name: str, *, is_call: bool) -> Form | None:
    """The result of a call with a known effect."""
    args = node.args
    if is_call and name in ("builtins.set", "builtins.frozenset") and len(args) == 1 and isinstance(args[0], list):
        return _set(name.endswith("frozenset"), args[0])  # before protocol 4
    if is_call and name == "builtins.getattr" and (attribute := _attribute(node)):
        return Form(f"name {attribute}")
    return _array(node, name, is_call=is_call)


def _is_call(node: Object) -> bool:
    """Whether a node is what a call gives, and nothing was added to it."""
    return node.state is ABSENT and not (node.items or node.pairs or node.kwargs or effects_of(node))


def _is_object(node: object) -> bool:
    return isinstance(node, Global) and _name(node) == "builtins.object"


def meant(node: object) -> object:
    """The bytes that a call makes, from before there were opcodes for them; any other node unchanged."""
    if not isinstance(node, Object) or not isinstance(node.cls, Global) or node.cls.name not in ("bytes", "bytearray"):
        return node
    made = {"builtins.bytes": bytes, "builtins.bytearray": bytearray}.get(_name(node.cls))
    text, *encoding = node.args or (b"",)
    if isinstance(text, str) and encoding == ["latin-1"] and max(text, default="") <= "\xff":
        text, encoding = text.encode("latin-1"), []
    is_plain = made is not None and isinstance(text, bytes) and not encoding and _is_call(node)
    return made(text) if is_plain else node  # type: ignore[misc]


def _name(node: Global, dot: str = ".") -> str:
    """A name as Python 3 and numpy 2 call it."""
    module, name = NAME_MAPPING.get((node.module, node.name)) or (node.module, node.name)
    module = IMPORT_MAPPING.get(module, module)
    if module.startswith("numpy.core."):
        module = f"numpy._core.{module[11:]}"
    return f"{module}{dot}{name}"


def _attribute(node: object) -> str:
    """The name that a nested class or bound method has since protocol 4; ``""``: it is something else."""
    names: list[str] = []
    while isinstance(node, Object) and len(node.args) == 2 and isinstance(node.args[1], str) and len(names) < 8:
        if not isinstance(node.cls, Global) or _name(node.cls) != "builtins.getattr" or not _is_call(node):
            return ""
        names.append(node.args[1])
        node = node.args[0]
    return ".".join((_name(node, ":"), *reversed(names))) if isinstance(node, Global) else ""


def _array(node: Object, name: str, *, is_call: bool) -> Form | None:
    """A numpy array: its type, shape, order and bytes, however its protocol encodes them."""
    if name == "numpy._core.multiarray._reconstruct" and isinstance(node.state, tuple) and len(node.state) == 5:
        cls, *rest = node.args or (None,)
        is_plain = isinstance(cls, Global) and cls.qualified == "numpy.ndarray" and rest == [(0,), b"b"]
        if not is_plain or node.state[0] != 1 or node.items or node.pairs or node.kwargs:
            return None
    elif name != "numpy._core.numeric._frombuffer" or len(node.args) != 4 or not is_call:
        return None
    dtype, data, shape, order = parts_of(node)
    order = "F" if order is True else "C" if order is False else order
    data = bytes(data) if isinstance(data, bytearray) else data
    return Form("array", [(HERE, part) for part in (dtype, shape, order, data)])


def token_of(node: object, depth: int = 4) -> bytes | None:
    """The identity of keys and members of sets; ``None``: they are not plain values and names."""
    node = meant(node)
    if isinstance(node, PLAIN):
        return plain_bytes(node)
    if isinstance(node, Global):
        return b"g" + _name(node, ":").encode("utf-8", "surrogatepass")
    inner: Sequence[object] = ()
    if isinstance(node, tuple):
        tag, inner = b"(", node
    elif isinstance(node, Object) and _is_call(node):
        tag, inner = b"o", (node.cls, *node.args)  # a member of an enumeration, a path
    else:
        return None
    if len(inner) > 16 or not depth:
        return None
    parts = [token_of(part, depth - 1) for part in inner]
    return None if None in parts else tag + b"".join(b"%d:%b" % (len(part), part) for part in parts if part is not None)


def plain_bytes(node: object) -> bytes:
    """A plain value with its type: no two have the same."""
    if isinstance(node, str):
        return b"s" + node.encode("utf-8", "surrogatepass")
    if isinstance(node, (bool, type(None), type(ABSENT))):
        return repr(node).encode()
    if isinstance(node, int):
        return b"i%x" % node
    if isinstance(node, float):
        return b"f" + struct.pack(">d", node)
    return (b"b" if isinstance(node, bytes) else b"a") + node  # type: ignore[operator]


def is_ordered(pairs: list[tuple[object, object]]) -> bool:
    """Whether the order of a mapping's keys says anything: not where they name tensors."""
    return not any(isinstance(value, TensorEntry) for _, value in pairs) or not all(
        isinstance(key, str) for key, _ in pairs
    )


def content_of(node: object) -> tuple[str, list[object], list[tuple[object, object]]]:
    """The meaning of a node that is not a tensor: its kind, its parts, and its pairs if it is a mapping.

    Of pairs with one key the last counts, and names of tensors are sorted, so that their order is not part of it.
    """
    form = form_of(node)
    pairs = form.pairs
    tokens = [token_of(key) for key, _ in pairs]
    if pairs and None not in tokens:
        last = dict(zip(tokens, pairs, strict=True))
        pairs = list(last.values())
        if not is_ordered(pairs):
            pairs = [last[token] for token in sorted(last, key=lambda token: token or b"")]
    return form.kind, [meant(part) for _, part in form.parts], [(meant(key), meant(value)) for key, value in pairs]
