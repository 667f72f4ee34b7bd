"""What the bytes of a file are used for, held against the tensors that were saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckptkit
from ckptkit.inspection.listing import list_tensors

Save = Callable[..., Path]


def storage(path: Path) -> dict[str, int]:
    found: dict[str, int] = ckptkit.inspect(path)["storage"]
    return found


def used(storages: int, nbytes: int, unique: int, tied: int = 0, shared: int = 0, unused: int = 0) -> dict[str, int]:
    return {
        "storages": storages, "nbytes": nbytes, "unique_tensor_nbytes": unique, "tied": tied, "shared": shared,
        "unused_nbytes": unused,
    }  # fmt: skip


BASE = torch.arange(100.0)


def test_a_tensor_for_each_storage(save: Save) -> None:
    assert storage(save({"a": torch.ones(3), "b": torch.ones(2, 2).t()})) == used(2, 28, 28)
    assert storage(save({"a": torch.ones(3), "e": torch.ones(0)})) == used(2, 12, 12)
    assert storage(save({"epoch": 3})) == used(0, 0, 0)


def test_tied_shared_and_unused(save: Save) -> None:
    assert storage(save({"a": BASE, "b": BASE})) == used(1, 400, 400, tied=1)
    assert storage(save({"a": BASE[:10], "b": BASE[:10]})) == used(1, 400, 40, tied=1, unused=360)
    assert storage(save({"a": BASE[:10], "b": BASE[20:40]})) == used(1, 400, 120, shared=2, unused=280)
    assert storage(save({"a": BASE, "b": BASE[5:]})) == used(1, 400, 780, shared=2)
    assert storage(save({"a": BASE[:60], "b": BASE[40:]})) == used(1, 400, 480, shared=2)
    assert storage(save({"a": BASE[:1].expand(100)})) == used(1, 400, 400, unused=396)
    assert storage(save({"a": BASE[::2]})) == used(1, 400, 200, unused=4)  # holes inside a view are not counted


def test_rnn_weights_of_one_flat_storage(save: Save) -> None:
    flat = torch.zeros(12)
    state = {"weight": flat[:8].view(2, 4), "bias": flat[8:]}
    assert storage(save(state)) == used(1, 48, 48, shared=2)


def test_across_sections_and_bare_storages(save: Save) -> None:
    saved = {"model": {"w": BASE}, "ema": {"w": BASE}, "part": BASE[:3], "bare": torch.ones(5).untyped_storage()}
    assert storage(save(saved)) == used(2, 420, 412, tied=1, shared=2)


def test_rows_go_by_kinds_and_are_the_same_one_by_one(save: Save) -> None:
    bare = nn.BatchNorm1d(3).state_dict()
    saved = {"model": {**bare, "tied": BASE, "part": BASE[:7]}, "ema": {"w": BASE, **bare}, "state": BASE[3:].view(97)}
    with ckptkit.open(save(saved), section="ema") as file:
        fresh, made = list_tensors(file.checkpoint).rows, list(list_tensors(file.checkpoint).rows)
    dicts = [row.to_dict() for row in made]
    assert len({row["tied_to"] for row in dicts}) > 6
    assert [row.to_dict() for row in (fresh[0], fresh[-1], *fresh[3:6])] == [dicts[0], dicts[-1], *dicts[3:6]]
    assert list(map(json.loads, fresh.to_json(slice(2, 99)))) == dicts[2:]
    for test in (lambda row: row.section == "model", lambda row: row.role == "buffer", lambda row: row.nbytes < 0):
        assert list(fresh.where(test)) == list(filter(test, made))
    assert sum(kind.nbytes * times for kind, times in fresh.counts()) == sum(row["nbytes"] for row in dicts)


def sections(path: Path, **options: Any) -> dict[str, tuple[int | None, int | None]]:
    document = ckptkit.inspect(path, **options)
    return {section["path"]: (section["parameters"], section["buffers"]) for section in document["sections"]}


def test_parameters_and_buffers_of_each_section(save: Save) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers())
    path = save({"model": model.state_dict(), "ema": model, "best": torch.tensor(1.0), "list": [torch.ones(2)]})
    assert sections(path, section="model") == {
        "model": (parameters, buffers), "ema": (parameters, buffers), "best": (None, None), "list": (None, None),
    }  # fmt: skip
    document = ckptkit.inspect(path, section="ema")
    roles = {(t["section"], t["name"]): (t["role"], t["role_inferred"]) for t in document["tensors"]}
    assert roles["model", "1.running_mean"] == ("buffer", True)
    assert roles["ema", "1.running_mean"] == ("buffer", False)
    assert roles["list", "0"] == ("unknown", False)
    assert (document["state_dict"]["parameters"], document["state_dict"]["buffers"]) == (parameters, buffers)


def test_what_is_tied_inside_a_section_counts_once_and_across_in_each(save: Save) -> None:
    weight = torch.ones(3, 4)
    path = save({"a": {"x": weight, "y": weight}, "b": {"x": weight}})
    assert sections(path) == {"a": (12, 0), "b": (12, 0)}


def test_shares_are_of_the_file(save: Save) -> None:
    path = save({"model": {"w": torch.ones(1000)}, "optimizer": {"state": {}, "param_groups": [{"x": torch.ones(1)}]}})
    document = ckptkit.inspect(path)
    shares = {section["path"]: section["share"] for section in document["sections"]}
    assert shares["model"] == round(4000 / path.stat().st_size, 6)
    assert all(0 <= share <= 1 for share in shares.values())
