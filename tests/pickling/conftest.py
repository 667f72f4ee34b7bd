"""Shared by the tests of pickles: Python as the oracle of what a pickle means."""

from __future__ import annotations

import collections
import copyreg
import datetime
import decimal
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest

from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, PersistentId

CLASSES: dict[tuple[str, str], Any] = {
    (module, cls.__qualname__): cls
    for module, names in {
        "builtins": (set, frozenset, complex, bytearray, bytes, list, int, slice, range, object),
        "__builtin__": (set, frozenset, complex, bytearray, bytes, list, int, slice, range, object),
        "collections": (collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque),
        "datetime": (datetime.datetime, datetime.date),
        "decimal": (decimal.Decimal,),
        "types": (types.SimpleNamespace,),
        "_codecs": (),
    }.items()
    for cls in names
}
CLASSES["__builtin__", "xrange"] = range
CLASSES["__builtin__", "bytes"] = bytes
CLASSES["_codecs", "encode"] = lambda text, encoding: text.encode(encoding)
CLASSES["copy_reg", "_reconstructor"] = CLASSES["copyreg", "_reconstructor"] = copyreg._reconstructor  # type: ignore[attr-defined]


def evaluate(root: object) -> Any:
    """What Python would have made of an inert tree, for the classes listed above."""
    memo: dict[int, Any] = {}

    def value(node: Any) -> Any:
        if node is None or isinstance(node, (bool, int, float, str, bytes, bytearray)):
            return node
        if id(node) in memo:
            return memo[id(node)]
        if isinstance(node, list):
            memo[id(node)] = result = []
            result.extend(map(value, node))
        elif isinstance(node, tuple):
            result = tuple(map(value, node))
        elif isinstance(node, InertDict):
            memo[id(node)] = result = {}
            result.update((value(k), value(v)) for k, v in node.pairs)
        elif isinstance(node, InertSet):
            result = (frozenset if node.frozen else set)(map(value, node.members))
        elif isinstance(node, Global):
            result = CLASSES[node.module, node.name]
        elif isinstance(node, PersistentId):
            result = ("pid", value(node.pid))
        else:
            return made(node)
        return memo.setdefault(id(node), result)

    def made(node: Object) -> Any:
        cls, args = value(node.cls), value(node.args)
        if node.how in ("newobj", "newobj_ex"):
            result = cls.__new__(cls, *args, **(value(node.kwargs) if node.kwargs is not None else {}))
        else:
            result = cls(*args)
        memo[id(node)] = result
        if node.items:
            result.extend(map(value, node.items))
        for key, item in node.pairs:
            result[value(key)] = value(item)
        if node.state is not ABSENT:
            result.__dict__.update(value(node.state))
        return result

    return value(root)


class PythonReader(pickle.Unpickler):
    """The oracle, with the same idea of a persistent id as `evaluate`."""

    def persistent_load(self, pid: object) -> object:
        return ("pid", pid)


def python_value(data: bytes) -> Any:
    return PythonReader(io.BytesIO(data)).load()


@pytest.fixture(scope="session", name="evaluate")
def _evaluate() -> Callable[[object], Any]:
    """What Python would have made of an inert tree."""
    return evaluate


@pytest.fixture(scope="session", name="python_value")
def _python_value() -> Callable[[bytes], Any]:
    """What Python makes of a pickle."""
    return python_value
