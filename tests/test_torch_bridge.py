"""The bridge gives what torch.load gives, bit for bit; torch is the oracle throughout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from support.generated_tensors import STORABLE
from torch import nn

import ckptkit
from ckptkit.checkpoint import StateDict
from ckptkit.dtypes import DTYPES
from ckptkit.errors import (
    CkptkitError,
    CorruptError,
    DTypeError,
    FileAccessError,
    MissingDependencyError,
    RewriteError,
    UnsupportedError,
)
from ckptkit.extras import INSTALL_TORCH, OLDEST_TORCH, require, require_torch
from ckptkit.formats import read
from ckptkit.torch_bridge import dtype_of, tensors

Save = Callable[..., Path]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


def values(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    checkpoint, file = read(path)
    try:
        return tensors(checkpoint.state_dict, **options)
    finally:
        file.close()


def storage_bytes(tensor: torch.Tensor) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Everything torch.load decides: names, order, geometry, bytes, flags, and what shares what."""
    assert list(ours) == list(theirs)
    for name, want in theirs.items():
        got = ours[name]
        assert type(got) is type(want), name
        for attribute in ("dtype", "shape", "device", "requires_grad", "is_leaf"):
            assert getattr(got, attribute) == getattr(want, attribute), (name, attribute)
        assert got.stride() == want.stride(), name
        assert got.storage_offset() == want.storage_offset(), name
        assert (got.is_conj(), got.is_neg()) == (want.is_conj(), want.is_neg()), name
        assert storage_bytes(got) == storage_bytes(want), name
    for group in (ours, theirs):
        sharing = [[a for a in group if share(group[a], group[b])] for b in group]
        same = [[a for a in group if group[a] is group[b]] for b in group]
        if group is ours:
            expected = sharing, same
    assert expected == (sharing, same)


def share(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0)


def random_bytes(name: str, count: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    raw = torch.randint(0, 2 if name == "bool" else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(getattr(torch, name))


@pytest.mark.filterwarnings("ignore:.*experimental and many operators:UserWarning")
@pytest.mark.parametrize("name", STORABLE)
def test_every_dtype_is_what_torch_loads(save: Save, name: str) -> None:
    path = save({"t": random_bytes(name)})
    assert_same(values(path), torch.load(path))
    assert dtype_of(name) is getattr(torch, name)


def test_the_order_is_the_files(save: Save) -> None:
    path = save({name: torch.zeros(1) for name in ("z", "a", "m")})
    assert list(values(path)) == ["z", "a", "m"]


def test_views_ties_offsets_and_odd_strides(save: Save) -> None:
    base = torch.arange(24, dtype=torch.float32)
    whole = base.view(2, 3, 4)
    path = save(
        {
            "whole": whole,
            "tied": whole.view(2, 3, 4),
            "same_object": whole,
            "transposed": whole.transpose(0, 2),
            "offset": base[5:9],
            "stepped": base[::3],
            "columns": base.view(4, 6)[:, :2],
            "expanded": base[:3].view(3, 1).expand(3, 5),
            "zero_size": torch.empty(0, 3),
            "zero_size_view": base[7:7],
            "scalar": torch.tensor(2.5),
            "scalar_view": base[3],
            "channels_last": torch.arange(48.0).view(1, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        }
    )
    ours = values(path)
    assert_same(ours, torch.load(path))
    assert ours["whole"] is ours["same_object"]
    assert ours["tied"].data_ptr() == ours["whole"].data_ptr()
    ours["offset"].fill_(-1)
    assert ours["whole"].flatten()[5:9].tolist() == [-1] * 4  # really one memory


def test_conjugate_and_negative_bits(save: Save, same_bits: SameBits) -> None:
    numbers = torch.tensor([1 + 2j, -0.0 + 3j, complex("nan")])
    imaginary = torch.tensor([1 + 2j, complex("inf")]).conj().imag  # negated lazily
    state = {"plain": numbers, "conj": numbers.conj(), "neg": torch._neg_view(numbers), "imaginary": imaginary}
    path = save(state)
    ours, theirs = values(path), torch.load(path)
    assert_same(ours, theirs)
    for name in state:
        assert same_bits(ours[name], state[name])


def test_gradients_and_parameters(save: Save) -> None:
    weight = nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    path = save({"w": weight, "w2": weight, "f": frozen, "g": torch.ones(2, requires_grad=True), "t": torch.ones(2)})
    assert_same(values(path), torch.load(path))


def test_a_buffer_that_is_no_plain_tensor_is_left_out(save: Save) -> None:
    path = save({"dense": torch.ones(2), "sparse": torch.eye(2).to_sparse(), "o": torch.ones(1)})
    assert list(values(path)) == ["dense", "o"]


def test_nothing_is_unpickled(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"t": torch.ones(2)})

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was loaded")

    for target in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(target, refuse)
    assert values(path)["t"].tolist() == [1, 1]


def test_memory_is_the_tensors_own_and_not_held_twice(tmp_path: Path, save: Save) -> None:
    path = save({"big": torch.full((32 << 18,), 3.0)})  # 32 MiB
    tracemalloc.start()
    try:
        ours = values(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    path.write_bytes(b"gone")
    assert bool((ours["big"] == 3).all())
    ours["big"][0] = 1  # writable
    ours["big"].untyped_storage().resize_(4)  # and torch's own to resize


def test_without_positioned_vector_reads(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"t": torch.randn(3_000_000), "u": torch.ones(3)})  # more than a chunk
    monkeypatch.delattr(os, "preadv", raising=False)
    assert_same(values(path), torch.load(path))


@pytest.mark.filterwarnings("ignore:.*experimental and many operators:UserWarning")
@pytest.mark.parametrize("name", STORABLE)
def test_big_endian(save: Save, name: str) -> None:
    with mock.patch("sys.byteorder", "big"):
        path = save({"t": random_bytes(name)})
    ours = values(path)["t"]
    row = DTYPES[name]
    if row.storage_class is not None:
        assert storage_bytes(ours) == storage_bytes(torch.load(path)["t"])
    # torch.load leaves the elements of untyped storages (uint16, ...) as they lie; the format says they are swapped.
    width = row.itemsize // 2 if row.kind == "complex" else row.itemsize
    swapped = numpy.frombuffer(storage_bytes(random_bytes(name)), dtype=f"u{width}").byteswap().tobytes()
    assert storage_bytes(ours) == swapped


def test_big_endian_views_of_different_width_are_refused(save: Save) -> None:
    base = torch.arange(8, dtype=torch.float32)
    with mock.patch("sys.byteorder", "big"):
        path = save({"a": base})
    state_dict = read(path)[0].state_dict
    odd = StateDict({**state_dict.everything, "c": replace(state_dict["a"], dtype="int64", shape=(2,), stride=(1,))})
    same = StateDict({**state_dict.everything, "c": replace(state_dict["a"], dtype="int32")})
    assert tensors(same)["c"].tolist() == tensors(same)["a"].view(torch.int32).tolist()
    with pytest.raises(UnsupportedError, match="elements of different widths"):
        tensors(odd)


# map_location.


@pytest.fixture
def tagged(save: Save) -> Path:
    """Two storages, as saved from two GPUs."""
    first, second = torch.arange(4.0), torch.arange(6.0)
    tags = {first.untyped_storage().data_ptr(): "cuda:0", second.untyped_storage().data_ptr(): "cuda:1"}
    return save({"a": first, "b": second, "a2": first[1:]}, device=lambda storage: tags[storage.data_ptr()])


@pytest.mark.parametrize(
    "location",
    [
        "cpu",
        torch.device("cpu"),
        {"cuda:0": "cpu", "cuda:1": "cpu"},
        lambda storage, location: storage,
        lambda storage, location: storage.cpu(),
    ],
    ids=["string", "device", "dict", "callable", "callable-moves"],
)
def test_map_location_to_the_cpu(tagged: Path, location: Any) -> None:
    assert_same(values(tagged, map_location=location), torch.load(tagged, map_location=location))


def test_map_location_callable_is_called_as_torch_calls_it(tagged: Path) -> None:
    def record(calls: list[object]) -> Callable[[Any, str], Any]:
        def locate(storage: Any, location: str) -> Any:
            calls.append((type(storage), bytes(storage), location, storage.device))
            return storage

        return locate

    ours: list[object] = []
    theirs: list[object] = []
    values(tagged, map_location=record(ours))
    torch.load(tagged, map_location=record(theirs))
    assert ours == theirs
    assert len(ours) == 2  # once for each storage


@pytest.mark.parametrize(
    "location", [None, "cuda:1", {"cuda:0": "cpu"}, lambda storage, location: None, "tpu", "cpu:0"]
)
def test_a_location_this_machine_lacks(tagged: Path, location: Any) -> None:
    with pytest.raises((RuntimeError, AssertionError)):  # before 2.3 it asserts that it has an HPU
        torch.load(tagged, map_location=location)
    with pytest.raises(RewriteError, match='give map_location="cpu"') as caught:
        values(tagged, map_location=location)
    assert str(tagged) in str(caught.value)


def test_cpu_files_need_no_map(save: Save) -> None:
    path = save({"t": torch.ones(2)})
    assert_same(values(path, map_location=lambda s, l: None), torch.load(path, map_location=lambda s, l: None))  # noqa: E741
    assert_same(values(path, map_location={"cuda:0": "cuda:1"}), torch.load(path))


@pytest.mark.parametrize(
    "location", ["meta", torch.device("meta"), {"cuda:0": "meta", "cuda:1": "meta"}], ids=["string", "device", "dict"]
)
def test_meta_reads_nothing(tagged: Path, location: Any) -> None:
    checkpoint, file = read(tagged)
    file.close()  # any read would raise
    ours = tensors(checkpoint.state_dict, map_location=location)
    theirs = torch.load(tagged, map_location=location)
    for name, want in theirs.items():
        got = ours[name]
        assert got.is_meta and want.is_meta
        assert (got.shape, got.stride(), got.storage_offset(), got.dtype) == (
            want.shape, want.stride(), want.storage_offset(), want.dtype,
        )  # fmt: skip
    with pytest.raises(FileAccessError, match="closed"):
        tensors(checkpoint.state_dict, map_location="cpu")


@pytest.mark.parametrize(
    "result", ["cpu", 3, torch.ones(2), torch.UntypedStorage(3)], ids=["text", "number", "tensor", "other-storage"]
)
def test_what_a_callable_returns_must_be_the_storage(tagged: Path, result: Any) -> None:
    with pytest.raises(RewriteError, match=r"expected a torch\.UntypedStorage of 16 bytes"):
        values(tagged, map_location=lambda storage, location: result)


def test_an_error_inside_the_callable_is_the_callers(tagged: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        values(tagged, map_location=lambda storage, location: 1 // 0)


def test_map_location_of_another_type(tagged: Path) -> None:
    with pytest.raises(RewriteError, match="map_location is of type int"):
        values(tagged, map_location=3)


# Errors.


def test_a_file_that_changes_or_shrinks(save: Save) -> None:
    path = save({"t": torch.ones(4_000_000)})
    checkpoint, file = read(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CorruptError, match="changed while it was being read"):
        tensors(checkpoint.state_dict)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptError, match="became shorter"):
        tensors(checkpoint.state_dict)
    file.close()


def test_integers_cannot_require_a_gradient(save: Save) -> None:
    checkpoint, file = read(save({"t": torch.ones(2, dtype=torch.int32)}))
    with pytest.raises(CorruptError, match="int32 is marked requires_grad"):
        tensors(StateDict({"t": replace(checkpoint.state_dict["t"], requires_grad=True)}))
    file.close()


def test_a_dtype_torch_lacks(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, file = read(save({"t": torch.ones(2, dtype=torch.int16)}))
    for name, since in {"uint16": "torch 2.3 or later has it", "bits16": "a newer torch may have it"}.items():
        monkeypatch.delattr(torch, name, raising=False)
        entry = replace(checkpoint.state_dict["t"], dtype=name)
        with pytest.raises(DTypeError, match=f"torch {re.escape(torch.__version__)} has no dtype {name}; {since}"):
            tensors(StateDict({"t": entry}))
    with pytest.raises(DTypeError, match="unknown dtype 'float31'"):
        dtype_of("float31")
    file.close()


def test_without_torch_the_command_that_installs_it_is_told(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from ckptkit.errors import MissingDependencyError\n"
        "try:\n    import ckptkit.torch_bridge\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(INSTALL_TORCH)
    assert "torch, which is not installed" in done.stdout


@pytest.mark.parametrize("version", ["2.0.1+cu118", "1.13.0", "2.1.0a0+git"])
def test_a_torch_that_is_too_old_says_so(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    if version.startswith("2.1"):
        require_torch()
        return
    with pytest.raises(
        MissingDependencyError, match=rf"torch {re.escape(version)} is installed, .* torch 2\.1 or later"
    ):
        require_torch()


def test_the_oldest_torch_is_the_one_that_is_declared() -> None:
    declared = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"' in declared


def test_an_optional_package_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfbroken.py").write_text("import nosuchthing")
    (tmp_path / "allbroken.py").write_text("raise OSError('libcudart.so: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"cannot be imported .*nosuchthing"):
        require("halfbroken")
    with pytest.raises(MissingDependencyError, match=r"cannot be imported .*libcudart"):
        require("allbroken")
    with pytest.raises(CkptkitError, match="is not installed"):
        require("notthere")


def test_torch_warns_of_nothing_when_every_dtype_is_loaded(tmp_path: Path, python: Any) -> None:
    """In a process of its own: what torch warns of, it says once."""
    program = "import warnings; warnings.simplefilter('error')\n"
    program += "import ckptkit, sys; print(len(ckptkit.load_state_dict(sys.argv[1])))"
    fixture = Path(__file__).parent.parent / "fixtures" / "tied.pth"
    with ckptkit.open(fixture) as file:
        lacking = [name for name, entry in file.state_dict.items() if not hasattr(torch, entry.dtype)]
    if lacking:  # an older torch
        fixture = Path(ckptkit.convert(fixture, tmp_path / "some.pth", exclude=lacking).details["destination"])
    done = python("-c", program, fixture)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == 39 - len(lacking)
