"""torch's pickle vocabulary by hand: every spelling of a tensor, and every lie about one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError, FormatError, UnsupportedError
from ckptkit.pickling.inert import Global, InertDict, Object, PersistentId, TreeMap
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.tensors import StorageTable, lower_storage, lower_tensor
from ckptkit.pickling.writer import write_pickle

Save = Callable[..., Path]

FILE = type("File", (), {"size": 1 << 62, "path": "none"})()
FLOATS = Global("torch", "FloatStorage")
HOOKS = Object("reduce", Global("collections", "OrderedDict"), ())


def pid(cls: object = FLOATS, key: object = "0", location: object = "cpu", numel: object = 10, *more: object) -> Any:
    return PersistentId(("storage", cls, key, location, numel, *more))


def call(function: str, *args: object) -> Object:
    module, _, name = function.rpartition(".")
    return Object("reduce", Global(module or "torch._utils", name), args)


def understood(node: object) -> Any:
    """The node written down and read back with torch's vocabulary known."""
    table = StorageTable(lambda key, nbytes: (ByteRange(FILE, 0, nbytes), None))
    data = write_pickle(node, lower=lambda other: other, protocol=4)
    return read_pickle(data, persistent_load=table.persistent_load, constructors=table.constructors).root


@pytest.mark.parametrize(
    "node",
    [
        call("_rebuild_tensor", pid(), 1, (2, 3), (3, 1)),
        call("_rebuild_tensor_v2", pid(), 1, (2, 3), (3, 1), False, HOOKS),
        call("_rebuild_tensor_v2", pid(), 1, (2, 3), (3, 1), False, None),
        call("_rebuild_tensor_v2", pid(), 1, [2, 3], [3, 1], False, InertDict(), InertDict()),
        call("_rebuild_tensor_v2", pid(), 1, call("torch.Size", (2, 3)), (3, 1), False, HOOKS, None),
        call("_rebuild_tensor_v2", pid(Global("torch.cuda", "FloatStorage")), 1, (2, 3), (3, 1), False, HOOKS),
        call("_rebuild_tensor_v3", pid(Global("torch.storage", "UntypedStorage"), "0", "cpu", 40), 1, (2, 3), (3, 1),
             False, HOOKS, Global("torch", "float32")),
        call("_rebuild_tensor_v3", pid(Global("torch", "UntypedStorage"), "0", "cpu", 40), 1, (2, 3), (3, 1),
             False, HOOKS, Global("torch", "float32"), InertDict()),
        call("_rebuild_parameter", call("_rebuild_tensor", pid(), 1, (2, 3), (3, 1)), False, HOOKS),
        call("torch._tensor._rebuild_from_type_v2", Global("torch._utils", "_rebuild_tensor_v2"),
             Global("torch", "Tensor"), (pid(), 1, (2, 3), (3, 1), False, HOOKS), None),
    ],
)  # fmt: skip
def test_every_spelling_of_a_tensor(node: Object) -> None:
    entry = understood(node)
    assert isinstance(entry, TensorEntry)
    assert (entry.storage_offset, entry.shape, entry.stride, entry.dtype) == (1, (2, 3), (3, 1), "float32")
    assert entry.storage.nbytes == 40


def v2(*args: object) -> Object:
    return call("_rebuild_tensor_v2", *args)


@pytest.mark.parametrize(
    "node",
    [
        v2(pid(), 0, (2,), (1,), False),
        v2(pid(), 0, (2,), (1,), False, HOOKS, None, None),
        v2(pid(), 0, (2,), (1,), "yes", HOOKS),
        v2(pid(), 0, (2,), (1,), False, InertDict([("hook", Global("os", "system"))])),
        v2(pid(), 0, (2,), (1,), False, HOOKS, InertDict([("fancy", True)])),
        v2(pid(), 0, (2,), (1,), False, HOOKS, InertDict([("conj", 1)])),
        v2(pid(), 0, (2,), (1,), False, HOOKS, "metadata"),
        v2("no storage", 0, (2,), (1,), False, HOOKS),
        v2(pid(Global("torch", "QInt8Storage")), 0, (2,), (1,), False, HOOKS),
        call("_rebuild_tensor", pid(), 0, (2,)),
        call("_rebuild_tensor_v3", pid(), 0, (2,), (1,), False, HOOKS),
        call("_rebuild_tensor_v3", pid(), 0, (2,), (1,), False, HOOKS, Global("torch", "float7")),
        call("_rebuild_tensor_v3", pid(), 0, (2,), (1,), False, HOOKS, Global("numpy", "float32")),
        call("_rebuild_tensor_v3", pid(), 0, (2,), (1,), False, HOOKS, "float32"),
        call("_rebuild_parameter", "no tensor", False, HOOKS),
        call("_rebuild_parameter", v2(pid(), 0, (2,), (1,), False, HOOKS), None, HOOKS),
        call("_rebuild_parameter", v2(pid(), 0, (2,), (1,), False, HOOKS), False, InertDict([(1, 2)])),
        call("_rebuild_parameter", v2(pid(), 0, (2,), (1,), False, HOOKS)),
        call("_rebuild_parameter", call("_rebuild_parameter", v2(pid(), 0, (2,), (1,), False, HOOKS), True, HOOKS),
             False, HOOKS),
        call("_rebuild_parameter_with_state", v2(pid(), 0, (2,), (1,), False, HOOKS), True, HOOKS),
        call("torch._tensor._rebuild_from_type_v2", Global("torch._utils", "_rebuild_other"), Global("a", "B"),
             (), None),
        call("torch._tensor._rebuild_from_type_v2", Global("mine", "_rebuild_tensor_v2"), Global("a", "B"),
             (pid(), 0, (2,), (1,), False, HOOKS), None),
        call("torch._tensor._rebuild_from_type_v2", Global("torch._utils", "_rebuild_tensor_v2"), "B",
             (pid(), 0, (2,), (1,), False, HOOKS), None),
        call("torch._tensor._rebuild_from_type_v2", Global("torch._utils", "_rebuild_tensor_v2"), Global("a", "B"),
             "args", None),
        call("torch._tensor._rebuild_from_type_v2", Global("torch._tensor", "_rebuild_from_type_v2"), Global("a", "B"),
             (Global("torch._utils", "_rebuild_tensor_v2"), Global("a", "C"),
              (pid(), 0, (2,), (1,), False, HOOKS), InertDict([("lost", "never")])), None),
    ],
)  # fmt: skip
def test_a_call_that_does_not_fit_stays_whole(node: Object) -> None:
    again = understood(node)
    assert isinstance(again, Object)
    assert again.class_name == node.class_name
    assert len(again.args) == len(node.args)


def test_rebuild_calls_nested_without_end_cost_no_stack() -> None:
    function, cls = Global("torch._tensor", "_rebuild_from_type_v2"), Global("torch", "Tensor")
    inner: object = (pid(), 0, (2,), (1,), False, HOOKS)
    for _ in range(50_000):
        inner = (function, cls, inner, None)
    assert isinstance(understood(Object("reduce", function, inner)), Object)  # type: ignore[arg-type]


BIG = 1 << 61


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((0, (11,), (1,)), "reach to byte 44 of a storage of 40 bytes"),
        ((1, (10,), (1,)), "reach to byte 44 of a storage of 40 bytes"),
        ((0, (2,), (10,)), "reach to byte 44 of a storage of 40 bytes"),
        ((0, (BIG,), (BIG,)), "of a storage of 40 bytes"),
        ((BIG, (1,), (1,)), "of a storage of 40 bytes"),
        ((0, (BIG, BIG, BIG), (1, 1, 1)), "more elements than torch can count"),
        ((0, (BIG, BIG, BIG), (0, 0, 0)), "more elements than torch can count"),
        ((-1, (2,), (1,)), "none may be negative"),
        ((0, (-1,), (1,)), "none may be negative"),
        ((9, (2,), (-1,)), "none may be negative"),
        ((0, (2,), (1, 1)), "differ in length"),
        ((0, (), (1,)), "differ in length"),
        ((0, (1,) * 65, (1,) * 65), "65 dimensions"),
        ((0.5, (2,), (1,)), "not 62-bit whole numbers"),
        ((True, (2,), (1,)), "not 62-bit whole numbers"),
        ((0, (2.0,), (1,)), "not 62-bit whole numbers"),
        ((0, (True,), (1,)), "not 62-bit whole numbers"),
        ((0, 2, 1), "not 62-bit whole numbers"),
        ((0, (2,), "1"), "not 62-bit whole numbers"),
        ((0, (1 << 62,), (0,)), "not 62-bit whole numbers"),
        ((1 << 62, (0,), (1,)), "not 62-bit whole numbers"),
        ((1 << 4000, (0,), (1,)), "not 62-bit whole numbers"),
    ],
)
def test_lying_geometry_is_refused(args: tuple[object, ...], words: str) -> None:
    for node in (
        call("_rebuild_tensor", pid(), *args),
        v2(pid(), *args, False, HOOKS),
        call("_rebuild_tensor_v3", pid(Global("torch.storage", "UntypedStorage"), "0", "cpu", 40), *args, False, HOOKS,
             Global("torch", "float32")),
    ):  # fmt: skip
        with pytest.raises(CorruptError, match=words) as caught:
            understood(node)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("node", "error", "words"),
    [
        (PersistentId("0"), UnsupportedError, "not a torch storage"),
        (PersistentId(("module", "cls", "file", "source")), UnsupportedError, "not a torch storage"),
        (PersistentId(("module", "a", "b", "c", "d")), UnsupportedError, "not a torch storage"),
        (PersistentId((b"storage", FLOATS, "0", "cpu", 10)), UnsupportedError, "not a torch storage"),
        (pid(key=0), CorruptError, "without key, location or size"),
        (pid(location=None), CorruptError, "without key, location or size"),
        (pid(numel=-1), CorruptError, "without key, location or size"),
        (pid(numel=True), CorruptError, "without key, location or size"),
        (pid(numel=1 << 62), CorruptError, "without key, location or size"),
        (pid(numel="10"), CorruptError, "without key, location or size"),
        (pid(FLOATS, "0", "cpu", 10, ("parent", 0, 5)), UnsupportedError, "view_metadata"),
        (pid(Global("mine", "FloatStorage")), UnsupportedError, "class mine.FloatStorage, which is not torch's"),
        (pid(Global("torch", "FancyStorage")), UnsupportedError, "class torch.FancyStorage, which is not torch's"),
        (pid(["FloatStorage"]), UnsupportedError, "class is a list, not a name"),
        ([pid(), pid(numel=11)], CorruptError, "named as 40 bytes of float32 on 'cpu' and as 44 bytes"),
        ([pid(), pid(location="cuda:0")], CorruptError, "on 'cpu' and as 40 bytes of float32 on 'cuda:0'"),
        ([pid(), pid(Global("torch", "IntStorage"))], CorruptError, "and as 40 bytes of int32"),
        ([pid(), pid(Global("torch", "UntypedStorage"), "0", "cpu", 40)], CorruptError, "and as 40 bytes of bytes"),
    ],
)  # fmt: skip
def test_lying_storages_are_refused(node: object, error: type[FormatError], words: str) -> None:
    with pytest.raises(error, match=words):
        understood(node)


def test_a_storage_class_that_is_a_deep_tree_is_refused_without_going_into_it() -> None:
    cls: list[object] = []
    for _ in range(50_000):
        cls = [cls]
    with pytest.raises(UnsupportedError, match="class is a list"):
        understood(pid(cls))


def test_one_key_is_one_storage() -> None:
    a, b, c = understood([pid(), pid(), pid(key="1")])
    assert a is b
    assert a is not c


def test_lowered_calls_are_understood_again() -> None:
    storage = understood(pid())
    for untyped in (False, True):
        entry = TensorEntry(storage=storage, storage_offset=1, shape=(2,), stride=(3,),
                            dtype="int32" if untyped else "float32", requires_grad=True, is_neg=True)  # fmt: skip
        lowered = lower_tensor(entry)
        assert lowered.class_name == f"torch._utils._rebuild_tensor_v{3 if untyped else 2}"
        mapped = TreeMap(lambda leaf: lower_storage(leaf, "0"))(lowered)  # type: ignore[arg-type]
        again = understood(mapped)
        assert (again.shape, again.stride, again.dtype, again.is_neg, again.requires_grad) == (
            entry.shape, entry.stride, entry.dtype, True, True)  # fmt: skip


# In a file.


def edit(path: Path, change: Callable[[bytes], bytes], *, deflate: str = "") -> Path:
    """The archive with its data.pkl changed, and one record deflated."""
    target = path.with_name("edited.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            data = source.read(name)
            kind = zipfile.ZIP_DEFLATED if deflate and name.endswith(deflate) else zipfile.ZIP_STORED
            out.writestr(name, change(data) if name.endswith("data.pkl") else data, kind)
    return target


def test_deflated_records_are_read_and_written_stored(save: Save, tmp_path: Path) -> None:
    path = save({"t": torch.arange(100.0)})
    for record in ("data/0", "data.pkl"):
        ckptkit.convert(edit(path, bytes, deflate=record), tmp_path / "new.pth", force=True)
        assert torch.load(tmp_path / "new.pth", weights_only=True)["t"].equal(torch.arange(100.0))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x007q", "storage '7' has no record data/7"),
        (b"X\x01\x00\x00\x000q", b"X\x0b\x00\x00\x00../data.pklq", "storage '../data.pkl' has no record"),
        (b"FloatStorage", b"DoubleStorage", "declared as 800 bytes, but its record has 400"),
        (b"Kd", b"Ke", "declared as 404 bytes, but its record has 400"),
    ],
)
def test_a_storage_its_record_does_not_bear_out(old: bytes, new: bytes, words: str, save: Save) -> None:
    path = save({"t": torch.zeros(100)})
    with pytest.raises(CorruptError, match=words) as caught:
        formats.read(edit(path, lambda data: data.replace(old, new)))
    assert caught.value.where == "data.pkl"
    assert str(path.with_name("edited.pth")) in str(caught.value)
