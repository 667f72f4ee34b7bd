"""Tensors read in one step are the tensors that their opcodes spell one by one, in honest and in changed pickles."""

from __future__ import annotations

import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import FormatError
from ckptkit.pickling.inert import Global, InertDict, Object, walk
from ckptkit.pickling.reader import PickleResult, read_pickle
from ckptkit.pickling.shortcut import TensorShortcut
from ckptkit.pickling.tensors import StorageTable

Save = Callable[..., Path]

UNTYPED = getattr(torch, "uint16", torch.uint8)
"""A dtype that torch saves as untyped bytes, where it has one."""


class Counting(TensorShortcut):
    """Counts what it understood."""

    taken = 0

    def __call__(self, data: bytes, at: int, memo: dict[int, object]) -> tuple[int, TensorEntry] | None:
        found = super().__call__(data, at, memo)
        self.taken += found is not None
        return found

    def follow(self, *args: Any) -> tuple[int, int]:
        end, count = super().follow(*args)
        self.taken += count
        return end, count


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def read(data: bytes, *, short: bool) -> tuple[PickleResult, int]:
    """What the pickle says, and how many tensors were read in one step."""
    table = StorageTable(lambda key, nbytes: (ByteRange(None, 0, nbytes), None))  # type: ignore[arg-type]
    shortcut = Counting(table.named, after=0)
    result = read_pickle(
        data,
        persistent_load=table.persistent_load,
        constructors=table.constructors,
        shortcut=shortcut if short else None,
        whole=True,
    )
    return result, shortcut.taken


def shape_of(root: object) -> list[Any]:
    """A tree as plain values: every node once, in order, with its sharing."""
    numbers: dict[int, int] = {}
    nodes = []
    for node in walk(root):
        numbers[id(node)] = len(numbers)
        nodes.append(node)

    def short(node: object) -> Any:
        return numbers[id(node)] if id(node) in numbers else (type(node).__name__, repr(node))

    described = []
    for node in nodes:
        if isinstance(node, TensorEntry):
            storage = node.storage
            parts: list[Any] = [
                node.storage_offset, node.shape, node.stride, node.dtype, node.requires_grad, node.is_parameter,
                node.is_conj, node.is_neg, storage.key, storage.nbytes, storage.location, storage.dtype,
            ]  # fmt: skip
        elif isinstance(node, Storage):
            parts = [node.key, node.nbytes, node.location]
        elif isinstance(node, InertDict):
            parts = [(short(key), short(value)) for key, value in node.pairs]
        elif isinstance(node, (list, tuple)):
            parts = [short(item) for item in node]
        elif isinstance(node, Object):
            parts = [node.how, short(node.cls), [short(arg) for arg in node.args], [short(item) for item in node.items],
                     [(short(key), short(value)) for key, value in node.pairs], short(node.state)]  # fmt: skip
        elif isinstance(node, Global):
            parts = [node.qualified]
        else:
            parts = [repr(node)]
        described.append((type(node).__name__, parts))
    return described


def outcome(data: bytes, *, short: bool) -> Any:
    """The tree and the calls of each name, or the kind of error."""
    try:
        result, _ = read(data, short=short)
    except FormatError as error:
        return type(error)
    return shape_of(result.root), [(name.qualified, name.calls) for name in result.globals], result.end


def many(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """So many tensors that the memo's later entries need long opcodes, as in real files."""
    return {**{f"layer{i}.weight": torch.zeros(i % 5 + 1) for i in range(60)}, **more}


BASE = torch.zeros(4, 6)
OBJECTS: dict[str, Any] = {
    "plain": many(),
    "shapes": many(
        scalar=torch.zeros(()), empty=torch.zeros(0, 3), seven=torch.zeros(1, 2, 1, 2, 1, 2, 1),
        row=torch.zeros(1, 300), cube=torch.zeros(2, 3, 4), four=torch.zeros(1, 2, 1, 70_000),
        wide=torch.zeros(1).expand(3_000_000_000),
    ),
    "views": many(base=BASE, part=BASE[1:, ::2], same=BASE, turned=BASE.t(), row=BASE[3]),
    "dtypes": many(long=torch.zeros(3, dtype=torch.int64), bool=torch.zeros(3, dtype=torch.bool),
                   half=torch.zeros(3, dtype=torch.bfloat16), short=torch.zeros(3, dtype=UNTYPED)),
    "grad": many(w=torch.zeros(2, requires_grad=True), conj=torch.zeros(2, dtype=torch.complex64).conj()),
    "whole model": nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))),
    "nested": {"model": many(), "list": [torch.zeros(1)] * 3, "hooks": torch.nn.Parameter(torch.zeros(2))},
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_it_reads_what_the_opcodes_read(save: Save, name: str) -> None:
    data = pickle_of(save(OBJECTS[name], device=lambda storage: "cuda:1" if storage.nbytes() % 8 else "cpu"))
    _, taken = read(data, short=True)
    assert taken > 20
    assert outcome(data, short=True) == outcome(data, short=False)


def test_a_small_file_is_read_so_from_its_second_tensor(save: Save) -> None:
    """Its memo entries are among the first 256, which have a shorter opcode."""
    data = pickle_of(save({f"layer{i}.weight": torch.zeros(i % 5, 2) for i in range(1, 24)}))
    assert read(data, short=True)[1] == 22 - 4  # the empty ones are left to the opcodes
    assert outcome(data, short=True) == outcome(data, short=False)


def test_pickles_of_another_protocol_are_left_to_the_opcodes(tmp_path: Path) -> None:
    torch.save(many(), tmp_path / "4.pth", pickle_protocol=4)
    data = pickle_of(tmp_path / "4.pth")
    assert read(data, short=True)[1] == 0
    assert outcome(data, short=True) == outcome(data, short=False)


@pytest.fixture
def data(save: Save) -> bytes:
    return pickle_of(save(many()))


def last_put(data: bytes, tensor: int) -> int:
    """The memo index of a tensor's size, which the shortcut leaves out."""
    at = -1
    for _ in range(tensor):
        at = data.index(b"((h", at + 1)
    size = data.index(b"\x85r", at)
    return int(struct.unpack_from("<I", data, size + 2)[0])


def test_what_is_left_out_can_be_referred_to(data: bytes) -> None:
    """A pickle that refers to a tensor's arguments is read again, opcode by opcode."""
    index = last_put(data, 50)
    changed = data[:-1] + b"j" + struct.pack("<I", index) + b"\x86."  # (the dict, a tensor's size)
    result, _ = read(changed, short=True)
    assert isinstance(result.root, tuple)
    assert result.root[1] == (50 % 5 + 1,)
    assert outcome(changed, short=True) == outcome(changed, short=False)


def test_sizes_spelled_several_times_can_be_referred_to(save: Save, tmp_path: Path) -> None:
    """As in the output of a conversion, which spells those of the first tensors for each."""
    ckptkit.convert(save({f"layer{i}.weight": torch.zeros(3, 2) for i in range(200)}), tmp_path / "out.pth")
    written = pickle_of(tmp_path / "out.pth")
    assert written.count(b"K\x03K\x02\x86") == 101
    assert read(written, short=True)[1] > 190
    assert outcome(written, short=True) == outcome(written, short=False)


def test_entries_are_counted_with_what_is_left_out(data: bytes) -> None:
    memo_size = data.count(b"r") + 1_000_000  # beyond every entry
    changed = data[:-1] + b"]\x94" + b"\x86."
    assert outcome(changed, short=True) == outcome(changed, short=False)
    missing = data[:-1] + b"j" + struct.pack("<I", memo_size) + b"\x86."
    assert outcome(missing, short=True) == outcome(missing, short=False)
    assert isinstance(outcome(missing, short=True), type)


def test_an_entry_written_again_is_the_last_one(data: bytes) -> None:
    """What a tensor's opcodes write over is found as they leave it."""
    index = last_put(data, 50)
    early = data[:2] + b"Nr" + struct.pack("<I", index) + b"0" + data[2:]  # None is memoized there first
    changed = early[:-1] + b"j" + struct.pack("<I", index) + b"\x86."
    assert outcome(changed, short=True) == outcome(changed, short=False)
    assert read(changed, short=True)[0].root[1] == (50 % 5 + 1,)  # type: ignore[index]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2, 3))])
def test_changed_bytes_mean_the_same_both_ways(save: Save, seed: int) -> None:
    honest = pickle_of(save({**many(), "tied": (w := torch.zeros(2, 2)), "tied2": w}))
    chance = random.Random(seed)
    agreeing = 0
    for _ in range(400):
        changed = bytearray(honest)
        for _ in range(chance.choice((1, 1, 1, 2))):
            at = chance.randrange(len(honest))
            changed[at] = chance.choice((chance.randrange(256), honest[chance.randrange(len(honest))]))
        found = outcome(bytes(changed), short=True)
        assert found == outcome(bytes(changed), short=False)
        agreeing += not isinstance(found, type)
    assert agreeing > 20  # not all of them are refused
