"""What goes to memory and comes from it: a tensor, a part of one, a rewritten checkpoint, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import event, given, settings
from support.generated_tensors import MANY, SAFETENSORS, SOME, STORABLE, TYPED, resumes, state_dicts, tagged, tensors_of
from support.torch_oracle import Same, bits, check_compacted, save

import ckptkit
from ckptkit.casting import CAST_TARGETS, numpy_dtype
from ckptkit.dtypes import DTYPES
from ckptkit.errors import DTypeError, RewriteError

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental")]


CASTS = st.sampled_from([name for name in CAST_TARGETS if name in STORABLE])
RENAMES = st.sampled_from([[r"\.=>_"], ["^layer=>block", "0=>"], {}, str.upper])
GLOBS = st.lists(st.sampled_from(["*", "*weight", "module*", "*0*"]), min_size=1, max_size=2)


def array_bits(array: Any) -> list[int]:
    return list(array.tobytes())


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """An index of a tensor of this shape that numpy and torch take too."""
    items: list[Any] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        if size and draw(st.booleans()):
            items.append(draw(st.integers(-size, size - 1)))
            continue
        bound = st.none() | st.integers(-size - 2, size + 2)
        items.append(slice(draw(bound), draw(bound), draw(st.none() | st.integers(1, 3))))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(items)))
        kept = len(shape) - len(items)
        items = [*items[:at], ..., *items[at:]] if kept == 0 or at == len(items) else items
    for _ in range(draw(st.integers(0, 1))):
        items.insert(draw(st.integers(0, len(items))), None)
    return tuple(items) if len(items) != 1 or draw(st.booleans()) else items[0]


@MANY
@given(data=st.data(), state=state_dicts())
def test_a_tensor_and_its_parts_are_what_torch_loads(folder: Path, data: st.DataObject, state: dict[str, Any]) -> None:
    path = save(state, folder / "source.pth", data.draw(tagged(tensors_of(state))))
    loaded = torch.load(path, map_location="cpu", weights_only=False)
    with ckptkit.open(path) as file:
        for name, entry in file.state_dict.items():
            tensor = loaded[name]
            index = data.draw(parts(entry.shape))
            for part, expected in ((entry, tensor), (entry[index], tensor[index])):
                assert part.shape == tuple(expected.shape)
                read = part.torch()
                assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
                if expected.is_neg() and DTYPES[part.dtype].itemsize == 1:
                    continue  # which torch itself cannot negate
                assert bits(read) == bits(expected)
                if DTYPES[entry.dtype].numpy is None:
                    with pytest.raises(DTypeError, match=r"numpy has no dtype.*torch\(\)"):
                        part.numpy()
                    continue
                array = part.numpy()
                assert (array.dtype, array.shape) == (numpy_dtype(entry.dtype), part.shape)
                assert array_bits(array) == bits(expected)
                assert array.flags.writeable or 0 in array.strides or part.nbytes > array.base.size
            assert isinstance(entry.torch(), torch.nn.Parameter) == isinstance(tensor, torch.nn.Parameter)
            assert entry.torch().requires_grad == tensor.requires_grad
            assert not entry[index].torch().requires_grad


@settings(MANY, max_examples=120)
@given(data=st.data(), tree=resumes() | state_dicts())
def test_load_is_what_is_saved_and_loaded(folder: Path, data: st.DataObject, tree: dict[Any, Any]) -> None:
    path = save(tree, folder / "source.pth")
    rewriters: list[Any] = [ckptkit.WeightsOnly()] if data.draw(st.booleans()) else []
    if data.draw(st.booleans()):
        rewriters.append(ckptkit.StripModule())
    if data.draw(st.booleans()):
        rewriters.append(ckptkit.Rename(data.draw(RENAMES)))
    if data.draw(st.booleans()):
        rewriters.append(ckptkit.Select(data.draw(GLOBS), ()))
    if data.draw(st.booleans()):
        rewriters.append(ckptkit.CastDtype(data.draw(CASTS)))
    rewriters += data.draw(st.sampled_from([[], [ckptkit.Tied("duplicate")], [ckptkit.MapLocation("cpu")]]))
    with ckptkit.open(path) as file:
        try:
            changed = file.rewrite(*rewriters)
            changed.save(folder / "saved.pth", force=True)
        except (RewriteError, DTypeError) as error:
            event(type(error).__name__)
            return
        if changed.checkpoint.origin.state_path is None:
            return
        found, expected = changed.load(), ckptkit.load_state_dict(folder / "saved.pth", map_location="cpu")
    Same()(expected, found)


@MANY
@given(tree=resumes() | state_dicts())
def test_what_is_saved_is_what_torch_loads(folder: Path, tree: dict[Any, Any]) -> None:
    try:
        ckptkit.save(tree, folder / "saved.pth", force=True)
    except DTypeError as error:
        assert "lazily negated" in str(error)
        return
    first = (folder / "saved.pth").read_bytes()
    loaded = torch.load(folder / "saved.pth", weights_only=False)
    same = Same(compacted=True)
    same(tree, loaded)
    check_compacted(same.tensors)
    ckptkit.save(tree, folder / "saved.pth", force=True)
    assert (folder / "saved.pth").read_bytes() == first


@SOME
@given(tree=resumes(TYPED))
def test_what_is_saved_loads_as_weights_only(folder: Path, tree: dict[Any, Any]) -> None:
    ckptkit.save(tree, folder / "saved.pth", force=True)
    Same(compacted=True)(tree, torch.load(folder / "saved.pth", weights_only=True))


@SOME
@given(state=state_dicts(SAFETENSORS))
def test_what_is_saved_as_safetensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file

    try:
        ckptkit.save(state, folder / "saved.safetensors", force=True)
    except RewriteError as error:
        event(str(error)[:40])
        return
    loaded = ckptkit.load_state_dict(folder / "saved.safetensors", map_location="cpu")
    assert list(loaded) == list(state)
    plain = load_file(folder / "saved.safetensors")
    for name, tensor in state.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor)
        assert name not in plain or bits(plain[name]) == bits(tensor)
