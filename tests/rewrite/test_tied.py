"""Tied tensors stay one, become copies, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import RewriteError, Tied
from ckptkit.checkpoint import tied_groups

Save = Callable[..., Path]
Through = Callable[..., Any]


def weights() -> dict[str, torch.Tensor]:
    """Ties, and what looks like them: slices, reshapes, transposes, conjugates, other memory."""
    base = torch.arange(12.0).reshape(3, 4)
    z = torch.arange(4.0).to(torch.complex64)
    return {
        "a": base, "b": base, "slice": base[1:], "slice again": base[1:], "reshaped": base.view(4, 3),
        "transposed": base.T, "c": base.view(3, 4), "z": z, "conj": z.conj(), "equal": base.clone(),
        "empty": base[:0], "empty again": base[:0], "counter": torch.tensor(3), "other": torch.ones(2),
    }  # fmt: skip


GROUPS = [["a", "b", "c"], ["slice", "slice again"]]


def together(state: dict[str, torch.Tensor]) -> set[tuple[str, str]]:
    """The pairs of names whose tensors share memory."""
    return {
        (one, two)
        for one in state
        for two in state
        if one < two
        and state[one].numel()
        and state[one].untyped_storage().data_ptr() == state[two].untyped_storage().data_ptr()
    }


def test_groups(save: Save) -> None:
    with ckptkit.open(save(weights())) as file:
        assert tied_groups(file.state_dict) == GROUPS
    with ckptkit.open(save(nn.Linear(2, 2).state_dict())) as file:
        assert tied_groups(file.state_dict) == []


def test_alias_changes_nothing(save: Save) -> None:
    with ckptkit.open(save(weights())) as file:
        assert Tied("alias")(file.checkpoint) is file.checkpoint


def test_copies(through: Through) -> None:
    saved = weights()
    found = through(saved, Tied("duplicate"))
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        assert torch.equal(found[name].resolve_conj(), tensor.resolve_conj())
        assert (found[name].shape, found[name].stride()) == (tensor.shape, tensor.stride())
        assert found[name].is_conj() == tensor.is_conj()
    copies = {"b", "c", "slice again"}
    assert together(found) == {pair for pair in together(saved) if not copies & set(pair)}
    found["b"].zero_()
    assert found["a"].sum() == saved["a"].sum()


def test_copies_cost_what_they_weigh(through: Through) -> None:
    big = torch.ones(10_000)
    once = through({"a": big, "b": big}, Tied("alias"), load=False).stat().st_size
    twice = through({"a": big, "b": big}, Tied("duplicate"), load=False).stat().st_size
    assert twice > once + big.nbytes


def test_what_stands_beside_the_weights_stays_with_the_first(through: Through) -> None:
    base = torch.ones(3)
    saved = {"state_dict": {"a": base, "b": base}, "best": {"in": [base]}, "epoch": 3}
    found = through(saved, Tied("duplicate"))
    assert found["best"]["in"][0].data_ptr() == found["state_dict"]["a"].data_ptr()
    assert found["state_dict"]["b"].data_ptr() != found["state_dict"]["a"].data_ptr()
    assert found["epoch"] == 3


def test_copies_keep_their_checksums_and_places(save: Save) -> None:
    base = torch.ones(3)
    with ckptkit.open(save({"a": base, "b": base}, device="cuda:1")) as file:
        first, second = Tied("duplicate")(file.checkpoint).state_dict.values()
        assert first.storage is file.state_dict["a"].storage
        assert second.storage is not first.storage
        for name in ("key", "dtype", "nbytes", "location", "source", "crc32", "byteorder", "original"):
            assert getattr(second.storage, name) == getattr(first.storage, name)


def test_a_tied_model_loads_from_copies(through: Through) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    found = through(model.state_dict(), Tied("duplicate"))
    assert found._metadata == model.state_dict()._metadata
    assert not together(found)
    model.load_state_dict(found)


def test_ties_are_refused(save: Save) -> None:
    with ckptkit.open(save(weights())) as file:
        with pytest.raises(RewriteError) as caught:
            Tied("error")(file.checkpoint)
        message = str(caught.value)
        assert message.startswith("2 tensors have several names: 'a' = 'b' = 'c'; 'slice' = 'slice again'; ")
    many = {f"{index}.{side}": tensor for index in range(9) for tensor in [torch.ones(1)] for side in "ab"}
    listed = r"^9 tensors .* '4\.a' = '4\.b' and 4 more"
    with ckptkit.open(save(many)) as file, pytest.raises(RewriteError, match=listed):
        Tied("error")(file.checkpoint)
    with ckptkit.open(save({"a": torch.ones(2), "b": torch.ones(2)})) as file:
        assert Tied("error")(file.checkpoint) is file.checkpoint


def test_no_such_policy() -> None:
    with pytest.raises(RewriteError, match="no policy 'keep' for tied tensors; choose from alias, duplicate, error"):
        Tied("keep")  # type: ignore[arg-type]
