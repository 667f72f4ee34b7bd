"""Strategies: Python objects as people leave them in checkpoints, and some that only pickle knows."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import uuid
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch


class Colour(enum.Enum):
    RED = 1
    GREEN = "green"


class Flags(enum.IntFlag):
    A = 1
    B = 2


Point = collections.namedtuple("Point", ["x", "y"])


class Box:
    """Keeps anything, itself included."""

    def __init__(self, content: object = None) -> None:
        self.content = content


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self, left: object, right: object) -> None:
        self.left, self.right = left, right


class Configured(dict):
    """A dict with attributes, made with keyword arguments."""

    def __new__(cls, *, name: str) -> Configured:
        self = super().__new__(cls)
        self.name = name
        return self

    def __init__(self, *, name: str) -> None:
        super().__init__()

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, str]]:
        return (), {"name": self.name}


class Tally(list):
    """A list with a state custom state."""

    total = 0

    def __getstate__(self) -> tuple[str, int]:
        return "total", self.total

    def __setstate__(self, state: tuple[str, int]) -> None:
        self.total = state[1]


def _configured(name: str, content: dict[str, object]) -> Configured:
    made = Configured(name=name)
    made.update(content)
    return made


def _tally(items: list[object]) -> Tally:
    made = Tally(items)
    made.total = len(items)
    return made


HASHABLE = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
)
LEAVES = HASHABLE | st.sampled_from(
    [
        float("nan"),
        -0.0,
        complex(-0.0, float("inf")),
        -(1 << 2047),
        "\ud800",
        "module.weight",
        b"\xff" * 300,
        bytearray(b"\0\xff"),
        datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
        datetime.date(1, 1, 1),
        datetime.timedelta(days=-1, microseconds=1),
        decimal.Decimal("0.1"),
        fractions.Fraction(-2, 3),
        pathlib.PurePosixPath("runs/1"),
        uuid.UUID(int=7),
        Colour.RED,
        Colour.GREEN,
        Flags.A | Flags.B,
        range(3, 9, 2),
        slice(1, None),
        Ellipsis,
        len,
        collections.OrderedDict,
        functools.partial(int, base=2),
        torch.float16,
        torch.Size([2, 3]),
        torch.device("cpu"),
        torch.strided,
        np.float64(1.5),
        np.arange(6, dtype=np.int16).reshape(2, 3).T,
        np.array([None, "x"], dtype=object),
    ]
)


def _containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inside, max_size=3)
    named = st.dictionaries(st.text(max_size=3), inside, max_size=3)
    return (
        some
        | some.map(tuple)
        | some.map(lambda items: collections.deque(items, maxlen=5))
        | some.map(_tally)
        | st.dictionaries(HASHABLE, inside, max_size=3)
        | named.map(lambda content: argparse.Namespace(**content))
        | named.map(collections.OrderedDict)
        | named.map(lambda content: collections.defaultdict(list, content))
        | st.builds(_configured, st.text(max_size=3), named)
        | st.builds(Point, inside, inside)
        | st.builds(Slotted, inside, inside)
        | st.builds(Box, inside)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
        | st.lists(st.text(max_size=2), max_size=3).map(collections.Counter)
    )


OBJECTS = st.recursive(LEAVES, _containers, max_leaves=8)


@st.composite
def graphs(draw: st.DrawFn) -> list[Any]:
    """Containers that hold one another, in cycles too."""
    kinds = st.sampled_from([list, dict, Box, collections.deque, argparse.Namespace, set])
    nodes = [kind() for kind in draw(st.lists(kinds, min_size=1, max_size=6))]
    for number, (a, b) in enumerate(draw(st.lists(st.tuples(*[st.integers(0, len(nodes) - 1)] * 2), max_size=12))):
        target, member = nodes[a], nodes[b]
        if draw(st.integers(0, 3)) == 0:
            member = (number, member)
        if isinstance(target, (list, collections.deque)):
            target.append(member)
        elif isinstance(target, dict):
            target[number] = member
        elif isinstance(target, set):
            if isinstance(member, Box) and not target:  # its members have no order to compare them by
                target.add(member)
        else:
            setattr(target, f"link{number}", member)
    return nodes
