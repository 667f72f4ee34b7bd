"""ZeRO's flat buffers: whatever the stage, the ranks and the settings, the full tensors come out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.zero_writer import OPTIMIZER, Zero, random_zero, same

import ckptkit
from ckptkit.errors import CorruptError
from ckptkit.formats.distributed.zero import joined_slots, split_slots


def optimizer_of(folder: Path) -> dict[str, Any]:
    optimizer: dict[str, Any] = ckptkit.load(folder)["optimizer"]  # type: ignore[index]
    return optimizer


@pytest.mark.parametrize(
    "seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(20, 60))]
)
def test_the_full_tensors_come_out(tmp_path: Path, seed: int) -> None:
    zero = random_zero(seed)
    folder = zero.save(tmp_path / "step")
    same(ckptkit.load_state_dict(folder), zero.full)  # each master is held against the module's on the way
    optimizer = optimizer_of(folder)
    state = optimizer["state"]
    steps = {} if zero.step is None else {"step": zero.step}
    assert state.keys() == (zero.masters.keys() if steps or zero.moments else set())
    for name, kept in state.items():
        same({k: v for k, v in kept.items() if k != "step"}, {k: zero.moment(name, k) for k in zero.moments})
        assert {k: float(v) for k, v in kept.items() if k == "step"} == steps
    names = [name for group in zero.flat_order() for name in group]
    assert [name for group in optimizer["param_groups"] for name in group["params"]] == names


def test_a_step_is_one_tensor_for_each_parameter(tmp_path: Path) -> None:
    zero = Zero(groups=[{"a": torch.ones(3), "b": torch.ones(2)}])
    ckptkit.convert(zero.save(tmp_path / "step"), tmp_path / "resume.pth")
    state = torch.load(tmp_path / "resume.pth", weights_only=True)["optimizer"]["state"]
    state["a"]["step"] += 1
    assert (state["a"]["step"], state["b"]["step"]) == (3, 2)


def test_what_is_not_laid_out_like_the_parameters_stays_by_rank(tmp_path: Path) -> None:
    zero = Zero(groups=[{"a": torch.randn(6, 2), "b": torch.randn(3)}])

    def edit(files: dict[str, Any]) -> None:
        for rank in range(2):
            base = files[OPTIMIZER.format(rank)]["optimizer_state_dict"]["base_optimizer_state"]
            base["state"][0]["row"] = torch.full((3, 1), float(rank))

    folder = zero.save(tmp_path / "step", edit)
    same(ckptkit.load_state_dict(folder), zero.full)
    optimizer = optimizer_of(folder)
    assert "row" not in optimizer["state"]["a"]
    assert [float(optimizer["by_rank"][f"rank {rank}"][0]["row"][0]) for rank in range(2)] == [0, 1]
    with ckptkit.open(folder) as file:
        assert [(each.code, each.severity) for each in file.findings if "rank" in each.code] == [
            ("optimizer-by-rank", "warning")
        ]


def test_places_of_joined_parameters() -> None:
    slots, totals = joined_slots([[("a", (2, 3)), ("b", ()), ("c", (4,))], [("d", (5,))]], [[2, 7, 0], [0]])
    assert [(slot.name, slot.flat, slot.start) for slot in slots] == [
        ("a", 0, 0),
        ("b", 0, 8),
        ("c", 0, 16),
        ("d", 1, 0),
    ]
    assert totals == [20, 5]
    with pytest.raises(CorruptError, match="gives 1 paddings for the 2 parameters of group 0"):
        joined_slots([[("a", (2,)), ("b", (1,))]], [[0]])


def test_places_of_split_parameters() -> None:
    groups = [[("a", (5,)), ("b", (2, 2))], [("c", (1,))]]
    assert [(s.name, s.flat, s.start) for s in split_slots(groups, [5, 1], 2)] == [
        ("a", 0, 0),
        ("b", 0, 3),
        ("c", 1, 0),
    ]
    assert [(s.name, s.flat, s.start) for s in split_slots(groups, [6], 2)] == [("a", 0, 0), ("b", 0, 3), ("c", 0, 5)]
    for sizes in ([5], [5, 2], [4, 2], [], [5, 1, 1], [7, 1]):
        with pytest.raises(CorruptError, match="its shares of the parameters have 6"):
            split_slots(groups, sizes, 2)
