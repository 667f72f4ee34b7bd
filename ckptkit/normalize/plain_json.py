"""Plain values as JSON, and back: those of Python that a pickle holds, but for objects.

JSON's own values are the same in Python; values that JSON cannot distinguish are an object with one key::

    {"$tuple": [...]}    {"$set": [...]}    {"$frozenset": [...]}    {"$size": [...]} (torch.Size)
    {"$dict": [[key, value], ...]}          a dict with other keys than text, or with one that begins with $
    {"$ordered": [[key, value], ...]}       collections.OrderedDict
    {"$namespace": [[name, value], ...]}    argparse.Namespace: its attributes
    {"$bytes": base64}   {"$bytearray": base64}   {"$dtype": ["float16"]}   {"$device": ["cuda", 0]} (torch's)
    {"$float": "7ff8000000000000"}          NaN and the infinities: their 64 bits in hexadecimal
    {"$weights": true}                      the place of the state_dict

Written values come back equal, but not the identity of two values that were one object.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from ckptkit.arguments import device_problem
from ckptkit.checkpoint import STATE_DICT, StateDict
from ckptkit.dtypes import DTYPES
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.content import meant, token_of
from ckptkit.normalize.sections import brief, step
from ckptkit.pickling.inert import (
    ABSENT,
    Global,
    InertDict,
    InertSet,
    Object,
    attributes,
    effects_of,
    is_global,
    mapping_items,
)

__all__ = [
    "MOST_DEEP",
    "WEIGHTS",
    "NotPlainError",
    "PlainReader",
    "PlainWriter",
    "WrongTextError",
    "is_plain",
    "parsed",
    "plain_extra",
    "plain_pairs",
    "plain_parts",
]

MOST_DEEP = 32
"""Values inside values that are written."""

_MOST_VALUES = 100_000
"""Values that are read back."""

_MOST_PLACES = 16
"""Places of the state_dict that are read back."""

WEIGHTS: Final = {"$weights": True}
"""The place of the state_dict."""


class NotPlainError(Exception):
    """A value is not plain; the message is its content, in words."""


class WrongTextError(Exception):
    """A text is not one that `PlainWriter` makes."""


class PlainWriter:
    """Makes JSON of plain values: of no more in all than are read back."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def part(self, node: object, depth: int = 0) -> Any:
        """A plain value as JSON, at a depth below the top; if it is not one, the part that was seen does not count.

        Raises:
            NotPlainError: it is not one, or there are too many.
        """
        left = self._left
        try:
            return self._value(node, depth)
        except NotPlainError:
            self._left = left
            raise

    def _value(self, node: object, depth: int) -> Any:
        node = meant(node)
        self._left -= 1
        if self._left < 0 or depth >= MOST_DEEP:
            raise NotPlainError("too many values" if self._left < 0 else "too many levels")
        if node is None or isinstance(node, (bool, int)):
            return node
        if isinstance(node, str):
            if not is_unicode(node):
                raise NotPlainError("text that is not valid Unicode")
            return node
        if isinstance(node, float):
            return node if math.isfinite(node) else {"$float": struct.pack(">d", node).hex()}
        if isinstance(node, (bytes, bytearray)):
            return {f"${type(node).__name__}": base64.b64encode(node).decode()}
        pairs = plain_pairs(node)
        if pairs is not None:
            return self.mapping(node, [(key, self._value(value, depth + 1)) for key, value in pairs])
        tag, members = _members(node)
        inner = [self._value(member, depth + 1) for member in members]
        return {tag: inner} if tag else inner

    def mapping(self, node: object, pairs: list[tuple[object, object]]) -> object:
        """A mapping of the class of ``node`` whose values are JSON already.

        Raises:
            NotPlainError: a key is not plain.
        """
        keys = [self._value(key, 1) for key, _ in pairs]
        values = [value for _, value in pairs]
        if isinstance(node, Object):
            return {"$ordered": list(map(list, zip(keys, values, strict=True)))}
        if all(isinstance(key, str) and not key.startswith("$") for key in keys):
            return dict(zip(keys, values, strict=True))
        return {"$dict": list(map(list, zip(keys, values, strict=True)))}


def is_unicode(text: str) -> bool:
    """Whether a text contains no half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _members(node: object) -> tuple[str, Sequence[object]]:
    """The tag of a value with several members, as the key of an object (``""``: a list), and its content.

    Raises:
        NotPlainError: it is of no known kind.
    """
    if isinstance(node, (list, tuple)):
        return "$tuple" if isinstance(node, tuple) else "", node
    if isinstance(node, Global) and node.module == "torch" and node.name in DTYPES and not node.effects:
        return "$dtype", [node.name]
    if effects_of(node):
        raise NotPlainError(f"holds {brief(node)}")
    if isinstance(node, InertSet):
        return "$frozenset" if node.frozen else "$set", node.members
    found = _of_object(node) if isinstance(node, Object) and not (node.items or node.pairs or node.kwargs) else None
    if found is None:
        raise NotPlainError(f"holds {brief(node)}")
    return found


def _of_object(node: Object) -> tuple[str, Sequence[object]] | None:
    """The same of an object of a class that is known."""
    (given,) = node.args if len(node.args) == 1 else (None,)
    if node.state is ABSENT and isinstance(given, (list, tuple)):
        tags = {"torch.Size": "$size", **{f"{m}.{n}": f"${n}" for m in _BUILTINS for n in ("set", "frozenset")}}
        if node.how == "reduce" and node.class_name in tags:
            return tags[node.class_name], given
    if node.state is ABSENT and node.how == "reduce" and is_global(node.cls, "torch", "device"):
        return ("$device", node.args) if _device_told(node.args) else None
    state = attributes(node)
    if state is node.state and state is not None and _is_namespace(node):
        pairs = plain_pairs(state)
        if pairs is not None and all(isinstance(key, str) and not key.startswith("__") for key, _ in pairs):
            return "$namespace", [[key, value] for key, value in pairs]
    return None


def _device_told(args: Sequence[object]) -> bool:
    """Whether these are the type of a device, or that and its number."""
    kind, *number = args or ("",)
    if not isinstance(kind, str) or len(number) > 1 or not all(type(each) is int for each in number):
        return False
    return device_problem(":".join((kind, *map(str, number)))) is None


_BUILTINS = ("builtins", "__builtin__")


def _is_namespace(node: Object) -> bool:
    """Whether an object is made as ``argparse.Namespace`` is, in any protocol."""
    if is_global(node.cls, "argparse", "Namespace"):
        return node.how == "newobj" and not node.args
    made = is_global(node.cls, "copyreg", "_reconstructor") or is_global(node.cls, "copy_reg", "_reconstructor")
    return made and len(node.args) == 3 and is_global(node.args[0], "argparse", "Namespace") and node.args[2] is None


def is_plain(node: object) -> bool:
    """Whether a value could be kept: nothing in it is more than Python's own values."""
    try:
        PlainWriter().part(node)
    except NotPlainError:
        return False
    return True


def plain_extra(state_dict: StateDict) -> list[str]:
    """The names of plain values among the tensors of a state_dict, but for those a module made (``_extra_state``)."""
    extra = state_dict.extra
    return [name for name, value in extra.items() if not name.endswith("_extra_state") and is_plain(value)]


def plain_parts(rest: object) -> list[str]:
    """The keys of what is beside the weights that lead to plain values."""
    return [step(key) for key, value in plain_pairs(rest) or () if is_plain(value)]


def plain_pairs(node: object) -> list[tuple[object, object]] | None:
    """The pairs of a dict or an OrderedDict that is nothing else, as Python would have them; ``None``: it is more."""
    pairs = mapping_items(node)
    if pairs is None or effects_of(node):
        return None
    if isinstance(node, Object):
        is_ordered = is_global(node.cls, "collections", "OrderedDict") and node.state is ABSENT
        if not is_ordered or node.items or node.kwargs is not None:
            return None
    last: dict[object, tuple[object, object]] = {}
    for key, value in pairs:
        token = token_of(key)
        if token is None:
            return None
        last[token] = last[token][0] if token in last else key, value
    return list(last.values())


def parsed(text: str) -> dict[str, Any]:
    """A document of version 1 that has such values.

    Raises:
        WrongTextError: it is too long, or something else.
    """
    if len(text) > 2 * DEFAULT_LIMITS.beside_nbytes:
        raise WrongTextError
    try:
        document = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise WrongTextError from None
    if not isinstance(document, dict) or document.get("version") != 1 or "tree" not in document:
        raise WrongTextError
    return document


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError
    return fields


class PlainReader:
    """Makes inert nodes of what was encoded.

    Attributes:
        places: how often the place of the state_dict was met.
    """

    def __init__(self) -> None:
        self.places = 0
        self._left = _MOST_VALUES

    def value(self, given: object, depth: int = 0) -> object:
        """The node of an encoded value.

        Raises:
            WrongTextError: it is not one, or there are too many.
        """
        self._left -= 1
        if self._left < 0 or depth >= MOST_DEEP:
            raise WrongTextError
        if isinstance(given, list):
            return [self.value(item, depth + 1) for item in given]
        if isinstance(given, str):
            return self._text(given)
        if not isinstance(given, dict):
            if isinstance(given, int) and given.bit_length() > 8 * DEFAULT_LIMITS.int_nbytes - 8:
                raise WrongTextError
            return given
        if not any(key.startswith("$") for key in given):
            return InertDict([(self._text(key), self.value(each, depth + 1)) for key, each in given.items()])
        if len(given) > 1:
            raise WrongTextError
        ((tag, inner),) = given.items()
        if tag in WEIGHTS and inner is True:
            self.places += 1
            if self.places > _MOST_PLACES:
                raise WrongTextError
            return STATE_DICT
        made = _MADE.get(tag)
        if made is None:
            raise WrongTextError
        if tag in ("$float", "$bytes", "$bytearray", "$dtype"):
            return made(inner)
        if not isinstance(inner, list):
            raise WrongTextError
        places = self.places
        if tag in ("$dict", "$ordered", "$namespace"):
            node = made(self._pairs(inner, depth + 1))
        else:
            node = made([self.value(item, depth + 1) for item in inner])
        if self.places > places and tag not in ("$tuple", "$dict", "$ordered"):
            raise WrongTextError
        return node

    def _pairs(self, given: list[object], depth: int) -> list[tuple[object, object]]:
        pairs = []
        for pair in given:
            if not isinstance(pair, list) or len(pair) != 2:
                raise WrongTextError
            pairs.append((self.value(pair[0], depth), self.value(pair[1], depth)))
        if any(token_of(key) is None for key, _ in pairs):
            raise WrongTextError
        return pairs

    def _text(self, text: str) -> str:
        if not is_unicode(text):
            raise WrongTextError
        return text


def _float(given: object) -> object:
    return struct.unpack(">d", _from_hex(given))[0]


def _from_hex(given: object) -> bytes:
    try:
        data = bytes.fromhex(given) if isinstance(given, str) else b""
    except ValueError:
        data = b""
    if len(data) != 8:
        raise WrongTextError
    return data


def _data(given: object) -> bytes:
    if not isinstance(given, str):
        raise WrongTextError
    try:
        return base64.b64decode(given, validate=True)
    except (ValueError, binascii.Error):
        raise WrongTextError from None


def _dtype(given: object) -> object:
    name = given[0] if isinstance(given, list) and len(given) == 1 else None
    if not isinstance(name, str) or name not in DTYPES:
        raise WrongTextError
    return Global("torch", name)


def _size(items: Iterable[object]) -> object:
    sizes = tuple(items)
    if not all(type(size) is int for size in sizes):
        raise WrongTextError
    return Object("reduce", Global("torch", "Size"), (sizes,))


def _device(items: list[object]) -> object:
    if not _device_told(items):
        raise WrongTextError
    return Object("reduce", Global("torch", "device"), tuple(items))


def _set(items: list[object]) -> object:
    if any(token_of(item) is None for item in items):
        raise WrongTextError
    return InertSet(items)


def _ordered(pairs: list[tuple[object, object]]) -> object:
    node = Object("reduce", Global("collections", "OrderedDict"), ())
    node.pairs = pairs
    return node


def _namespace(pairs: list[tuple[object, object]]) -> object:
    if not all(isinstance(key, str) and not key.startswith("__") for key, _ in pairs):
        raise WrongTextError
    node = Object("newobj", Global("argparse", "Namespace"), ())
    node.state = InertDict(pairs)
    return node


_MADE: dict[str, Callable[[Any], object]] = {
    "$tuple": tuple,
    "$set": _set,
    "$frozenset": lambda items: InertSet(_set(items).members, frozen=True),  # type: ignore[attr-defined]
    "$size": _size,
    "$device": _device,
    "$dict": InertDict,
    "$ordered": _ordered,
    "$namespace": _namespace,
    "$bytes": _data,
    "$bytearray": lambda given: bytearray(_data(given)),
    "$float": _float,
    "$dtype": _dtype,
}
"""The functions that make a value from each object with one key."""
