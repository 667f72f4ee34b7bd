"""What only files before torch 1.6 use: views of storages, classes with their source, Variables."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, UnsupportedError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.dialects import LegacyTable, writing_release
from ckptkit.pickling.inert import Global, InertDict, Object, walk
from ckptkit.pickling.reader import PickleResult, read_pickle

FLOATS, INTS = Global("torch", "FloatStorage"), Global("torch", "IntStorage")
PARAMETER, VARIABLE = b"ctorch.nn.parameter\nParameter\n", b"ctorch.autograd.variable\nVariable\n"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SourceFile]:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    source = SourceFile(path)
    yield source
    source.close()


@pytest.fixture
def table(file: SourceFile) -> LegacyTable:
    return LegacyTable(file, DEFAULT_LIMITS)


def pid(key: object = "1", numel: object = 10, view: object = None, cls: object = FLOATS) -> tuple[object, ...]:
    return ("storage", cls, key, "cpu", numel, view)


def storage(table: LegacyTable, *args: Any, **kwargs: Any) -> Storage:
    found = table.persistent_load(pid(*args, **kwargs))
    assert isinstance(found, Storage)
    return found


def entry(table: LegacyTable, *args: object) -> TensorEntry:
    found = table.constructors["torch._utils", "_rebuild_tensor"](args)
    assert isinstance(found, TensorEntry)
    return found


# Storages and views.


def test_bytes_are_found_once_they_are_known(table: LegacyTable, file: SourceFile) -> None:
    root, view = storage(table), storage(table, view=("2", 3, 2))
    tensor = entry(table, view, 1, (1,), (1,))
    table.settle("1", ByteRange(file, 100, 40))
    assert root.source == ByteRange(file, 100, 40)
    assert view.source == ByteRange(file, 112, 8)
    assert tensor.storage is root
    assert tensor.storage_offset == 4
    assert storage(table, view=("3", 0, 1)).source == ByteRange(file, 100, 4)  # named after the bytes were found
    assert list(table.storages) == ["1"]


def test_one_key_is_one_view(table: LegacyTable) -> None:
    assert storage(table, view=("2", 3, 2)) is storage(table, view=("2", 3, 2))
    assert storage(table, view=("2", 3, 2)) is not storage(table, view=("3", 3, 2))


@pytest.mark.parametrize(
    ("pids", "error", "words"),
    [
        ([pid(view=("2", 3))], CorruptError, "view of storage '1' without key, offset and size"),
        ([pid(view=["2", 3, 1])], CorruptError, "without key, offset and size"),
        ([pid(view=(2, 3, 1))], CorruptError, "without key, offset and size"),
        ([pid(view=("2", True, 1))], CorruptError, "without key, offset and size"),
        ([pid(view=("2", 3, "1"))], CorruptError, "without key, offset and size"),
        ([pid(view=("2", 8, 3))], CorruptError, "elements 8 to 11 is not inside storage '1' of 40 bytes"),
        ([pid(view=("2", -1, 3))], CorruptError, "is not inside"),
        ([pid(view=("2", 3, -1))], CorruptError, "is not inside"),
        ([pid(view=("2", 1 << 100, 1))], CorruptError, "is not inside"),
        ([pid(view=("1", 3, 2))], AmbiguousError, "view '1' of storage '1' is also named as something else"),
        ([pid(view=("2", 3, 2)), pid(view=("2", 4, 2))], AmbiguousError, "'2' .* also named as something else"),
        ([pid(view=("2", 3, 2)), pid(view=("2", 3, 1))], AmbiguousError, "'2' .* also named as something else"),
        ([pid(view=("2", 3, 2)), pid("9", view=("2", 3, 2))], AmbiguousError, "'2' .* also named as something else"),
        ([pid(view=("2", 3, 2)), pid("2")], AmbiguousError, "storage '2' is also named as a view"),
        ([pid("2"), pid(view=("2", 3, 2))], AmbiguousError, "also named as something else"),
        ([pid(), pid(cls=INTS)], CorruptError, "as 40 bytes of float32 .* and as 40 bytes of int32"),
        ([("module", 1, 2)], UnsupportedError, "not a torch storage"),
        ([("module", FLOATS, 1, "x")], CorruptError, "whose file or source is not text"),
        ([("module", FLOATS, "x", [])], CorruptError, "whose file or source is not text"),
    ],
)
def test_lies_about_storages(pids: list[object], error: type[FormatError], words: str, table: LegacyTable) -> None:
    with pytest.raises(error, match=words):
        for each in pids:
            table.persistent_load(each)


def test_a_tensor_is_held_against_the_view_it_lies_in(table: LegacyTable) -> None:
    view = storage(table, view=("2", 3, 2))
    with pytest.raises(CorruptError, match="reach to byte 12 of a storage of 8 bytes"):
        entry(table, view, 0, (3,), (1,))


def test_a_tensor_over_half_an_element(table: LegacyTable) -> None:
    view = storage(table, cls=Global("torch.storage", "UntypedStorage"), numel=40, view=("2", 6, 16))
    args = (view, 0, (2,), (1,), False, None, Global("torch", "float32"))
    with pytest.raises(CorruptError, match="which begins inside an element"):
        table.constructors["torch._utils", "_rebuild_tensor_v3"](args)


def test_no_dimensions_meant_no_elements(table: LegacyTable) -> None:
    assert entry(table, storage(table, "1", 0), 0, (), ()).shape == (0,)
    assert entry(table, storage(table, "2", 1), 0, (), ()).shape == ()


# Classes.


def test_a_class_stands_for_itself_and_its_source_is_kept(table: LegacyTable) -> None:
    net, bare = Global("model", "Net"), Global("model", "Bare")
    assert table.persistent_load(("module", net, "model.py", "class Net: ...")) is net
    assert table.persistent_load(("module", bare, None, None)) is bare
    assert table.sources == [(net, "model.py", "class Net: ...")]


# Variables.


class Pickler(pickle.Pickler):
    """Storages are those of the file below."""

    def persistent_id(self, obj: Any) -> object:
        is_pid = type(obj) is tuple and obj[:1] == ("pid",)
        return ("storage", torch.FloatStorage, obj[1], "cpu", 6, None) if is_pid else None


def v1(key: str = "1") -> bytes:
    """The opcodes of a tensor of six elements."""
    out = io.BytesIO()
    Pickler(out, 2).dump(("pid", key))
    return b"ctorch._utils\n_rebuild_tensor\n(" + out.getvalue()[2:-1] + b"K\x00K\x02K\x03\x86K\x03K\x01\x86tR"


HOOKS = b"ccollections\nOrderedDict\n)R"
STATE3 = b"(\x88\x89" + HOOKS + b"tb"


def understood(opcodes: bytes, table: LegacyTable) -> tuple[object, PickleResult]:
    data = b"\x80\x02" + opcodes + b"."
    result = read_pickle(data, persistent_load=table.persistent_load, constructors=table.constructors)
    return table.understood(result), result


@pytest.mark.parametrize(
    ("opcodes", "is_parameter", "requires_grad"),
    [
        (PARAMETER + v1() + b"\x85R" + STATE3, True, True),
        (PARAMETER + v1() + b"\x85R(\x89\x89Ntb", True, False),
        (VARIABLE + v1() + b"\x85R" + STATE3, False, True),
        (PARAMETER + b")\x81(" + v1() + b"NN\x88\x89tb", True, True),
        (PARAMETER + b")\x81(" + v1() + b"N" + HOOKS + b"\x89\x89tb", True, False),
        (VARIABLE + b")\x81(" + v1() + b"NN\x89\x89tb", False, False),
        (PARAMETER + v1() + b"\x89\x86R", True, False),
        (PARAMETER + v1() + b"\x85R", True, True),
        (VARIABLE + v1() + b"\x85R", False, False),
        (b"ccopy_reg\n__newobj__\n" + PARAMETER + v1() + b"\x86R" + STATE3, True, True),
        (PARAMETER + b"ctorch\nFloatTensor\n)R(" + v1()[v1().index(b"(") + 1 : -1] + b"b\x85R" + STATE3, True, True),
    ],
)  # fmt: skip
def test_every_way_to_save_one(opcodes: bytes, is_parameter: bool, requires_grad: bool, table: LegacyTable) -> None:
    # Twice the same object, as in a tied model; torch gives the same flags.
    root, _ = understood(b"]q\x00(" + opcodes + b"q\x09h\x09e", table)
    assert isinstance(root, list)
    assert isinstance(root[0], TensorEntry)
    assert root[0] is root[1]
    assert (root[0].shape, root[0].is_parameter, root[0].requires_grad) == ((2, 3), is_parameter, requires_grad)
    expected = loaded(b"\x80\x02" + opcodes + b".")
    assert isinstance(expected, torch.nn.Parameter) == is_parameter
    assert (expected.requires_grad, tuple(expected.shape)) == (requires_grad, (2, 3))


def loaded(data: bytes) -> Any:
    """What torch makes of it."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            memory = torch.zeros(6).untyped_storage()
            return torch.storage.TypedStorage(wrap_storage=memory, dtype=torch.float32, _internal=True)

    return Unpickler(io.BytesIO(data)).load()


@pytest.mark.parametrize(
    "opcodes",
    [
        PARAMETER + b"K\x01\x85R" + STATE3,  # of no tensor
        PARAMETER + v1() + b"\x85R(\x88\x89}K\x01K\x02stb",  # hooks
        PARAMETER + v1() + b"\x85R(K\x01\x89Ntb",
        PARAMETER + v1() + b"\x85R\x88\x89\x86b",
        PARAMETER + v1() + b"\x85R(\x88\x89NNNNtb",
        PARAMETER + b")R",
        PARAMETER + v1() + b"\x85RK\x05K\x06s" + STATE3,
        PARAMETER + PARAMETER + v1() + b"\x85R" + STATE3 + b"\x85R" + STATE3,  # of a parameter
        PARAMETER + b")\x81(" + v1() + b"K\x01N\x88\x89tb",  # a gradient that is a number
        b"ctorch\nFloatTensor\n)R}b",
        b"ctorch\nFloatTensor\nK\x01\x85R",
    ],
)  # fmt: skip
def test_what_is_more_than_that_stays_an_object(opcodes: bytes, table: LegacyTable) -> None:
    root, result = understood(opcodes, table)
    assert isinstance(root, Object)
    assert root.class_name == result.root.class_name  # type: ignore[attr-defined]


def test_a_gradient_is_an_attribute(table: LegacyTable) -> None:
    gradient = VARIABLE + b")\x81(" + v1("2") + b"NN\x89\x89tb"
    root, _ = understood(PARAMETER + b")\x81(" + v1() + gradient + b"N\x88\x89tb", table)
    assert isinstance(root, TensorEntry)
    assert isinstance(root.attributes, InertDict)
    grad = root.attributes["grad"]
    assert isinstance(grad, TensorEntry)
    assert (root.storage.key, grad.storage.key, grad.is_parameter) == ("1", "2", False)


def test_a_gradient_that_has_one_stays_as_it_is(table: LegacyTable) -> None:
    inner = VARIABLE + b")\x81(" + v1("2") + v1("3") + b"N\x89\x89tb"
    root, _ = understood(PARAMETER + b")\x81(" + v1() + inner + b"N\x88\x89tb", table)
    assert isinstance(root, Object)
    keys = {node.storage.key for node in walk(root) if isinstance(node, TensorEntry)}
    assert keys == {"1", "2", "3"}


def test_a_tree_without_them_is_the_same_tree(table: LegacyTable) -> None:
    root, result = understood(b"]" + v1() + b"a", table)
    assert root is result.root


def test_many_parameters_in_a_deep_tree(table: LegacyTable) -> None:
    depth = 20_000
    opcodes = b"]" * depth + PARAMETER + b"q\x01" + v1() + b"\x85R" + STATE3 + b"a" * depth
    root, _ = understood(opcodes, table)
    assert [type(node) for node in walk(root)][depth:] == [TensorEntry]


def test_the_era() -> None:
    def called(*names: str) -> list[Global]:
        made = [Global(*name.rsplit(".", 1)) for name in names]
        for name in made:
            name.calls = 1
        return made

    assert writing_release([]) is None
    assert writing_release([Global("torch._utils", "_rebuild_tensor_v2")]) is None
    assert writing_release(called("torch._utils._rebuild_tensor")) == "torch 0.1 to 0.3"
    assert writing_release(called("torch.nn.parameter.Parameter")) == "torch 0.1 to 0.3"
    assert str(writing_release(called("torch._utils._rebuild_tensor_v2"))).startswith("torch 0.4 to 1.5")
    assert str(writing_release(called("torch._utils._rebuild_tensor_v3"))).startswith("torch 2.0 or later")
