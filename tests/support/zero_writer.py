"""Folders as DeepSpeed writes them, from full tensors: its rules once more, without its code.

Every element of padding is 777, so that one that is taken for a value is seen.
"""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

PADDING = 777.0
VERSION = "0.19.8"

OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
"""The files: of a rank's optimizer (in bfloat16), of the module, of a rank's at stage 3."""


class ZeroStageEnum(int, enum.Enum):
    disabled, optimizer_states, gradients, weights = range(4)


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0
        self.dynamic = False


@dataclass
class fragment_address:
    numel: int
    start: int


_PLACES = {
    "deepspeed.runtime.zero.config": ZeroStageEnum,
    "deepspeed.runtime.fp16.loss_scaler": LossScaler,
    "deepspeed.utils.tensor_fragment": fragment_address,
}


@contextmanager
def deepspeeds_classes() -> Iterator[None]:
    """Let the classes be pickled under DeepSpeed's names."""
    modules = {}
    for place, cls in _PLACES.items():
        cls.__module__ = place
        for name in (".".join(place.split(".")[:n]) for n in range(1, place.count(".") + 2)):
            modules.setdefault(name, types.ModuleType(name))
        setattr(modules[place], cls.__name__, cls)
    with pytest.MonkeyPatch.context() as patch:  # one by one: threads of others import meanwhile
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def written(files: Mapping[str, Any], folder: Path) -> Path:
    """Write files of these names; gives the folder."""
    with deepspeeds_classes():
        for name, tree in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(tree, folder / name)
    return folder


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Tensors of the same names are the same, whatever their order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name


@dataclass(kw_only=True)
class Zero:
    """What is written, and how.

    Attributes:
        groups: the optimizer's groups: names and fp32 masters.
        stage: of ZeRO; -1: BF16_Optimizer.
        world: data-parallel ranks.
        dtype: of the forward pass.
        buffers, frozen: beside the parameters, of any dtype.
        tied: another name of a parameter -> the one that has the values.
        sub_group: stage 3: elements of a rank's shares after which a new buffer begins.
        aligned, elastic, round_robin: the settings of these names.
        moments: names of what the optimizer keeps for each element.
        step: as the optimizer keeps it: a tensor of no dimensions, or a number; ``None``: not at all.
        client: what the user added.
    """

    groups: Sequence[Mapping[str, torch.Tensor]]
    stage: int = 1
    world: int = 2
    dtype: torch.dtype = torch.bfloat16
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    sub_group: int = 1 << 30
    aligned: bool = False
    elastic: bool = False
    round_robin: bool = False
    moments: Sequence[str] = ("exp_avg", "exp_avg_sq")
    step: Any = 2.0
    client: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def small(cls, **options: Any) -> Zero:
        """One of a few parameters in two groups, and two buffers."""
        generator = torch.Generator().manual_seed(1)
        groups = [
            {
                "emb.weight": torch.randn(7, 3, generator=generator),
                "head.weight": torch.randn(2, 3, generator=generator),
            },
            {"head.bias": torch.randn(2, generator=generator), "scale": torch.randn((), generator=generator)},
        ]
        buffers = {"running": torch.randn(3, generator=generator), "count": torch.tensor(3)}
        return cls(**{"groups": groups, "buffers": buffers, **options})

    @property
    def masters(self) -> dict[str, torch.Tensor]:
        """Names and values of all parameters that are trained."""
        return {name: value for group in self.groups for name, value in group.items()}

    def moment(self, name: str, what: str) -> torch.Tensor:
        """What the optimizer keeps of a parameter."""
        generator = torch.Generator().manual_seed(hash_of(f"{name} {what}"))
        return torch.randn(self.masters[name].shape, generator=generator)

    @property
    def full(self) -> dict[str, torch.Tensor]:
        """The state_dict that is expected."""
        found = {**self.buffers, **self.frozen, **self.masters}
        return {**found, **{alias: found[name] for alias, name in self.tied.items()}}

    @property
    def module(self) -> dict[str, torch.Tensor]:
        """The state_dict of the forward pass."""
        found: dict[str, torch.Tensor] = {**self.buffers, **self.frozen}
        found |= {name: value.to(self.dtype) for name, value in self.masters.items()}
        return {**found, **{alias: found[name] for alias, name in self.tied.items()}}

    # The files.

    def save(self, folder: Path, edit: Callable[[dict[str, Any]], object] = bool) -> Path:
        """Write all of them, once their trees were edited; gives the folder."""
        files = self.files()
        edit(files)
        return written(files, folder)

    def files(self) -> dict[str, Any]:
        """The trees of all files, by their names."""
        if self.stage == 0:
            return {MODEL: {**self._model(0), "optimizer": self._plain_optimizer()}}
        name = OPTIMIZER if self.dtype is torch.bfloat16 else OPTIMIZER.removeprefix("bf16_")
        layout = self._split() if self.stage == 3 else self._joined()
        found: dict[str, Any] = {}
        for rank, state in enumerate(layout):
            tree = {"optimizer_state_dict": state, "ds_config": {"zero_optimization": {}}, "ds_version": VERSION}
            found[name.format(rank)] = tree
            if self.stage == 3:
                found[MODEL_3.format(rank)] = self._model(rank)
        return found if self.stage == 3 else {MODEL: self._model(0), **found}

    def flat_order(self) -> list[dict[str, torch.Tensor]]:
        """The parameters of each flat buffer, in its order."""
        if self.stage == 3:
            return [part for group in self.groups for part in self._sub_groups(dict(group))]
        if not self.round_robin:
            return [dict(group) for group in self.groups]
        ordered = []
        for group in self.groups:
            pairs = list(group.items())
            ordered.append(dict(pair for rank in range(self.world) for pair in pairs[rank :: self.world]))
        return ordered

    def _sub_groups(self, group: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        part: dict[str, torch.Tensor] = {}
        for name, value in group.items():
            part[name] = value
            if sum(self._share(each) for each in part.values()) >= self.sub_group:
                yield part
                part = {}
        if part:
            yield part

    def _share(self, value: torch.Tensor) -> int:
        return -(-value.numel() // self.world)

    def _model(self, rank: int) -> dict[str, Any]:
        saves_frozen = self.stage in (2, 3)
        module = OrderedDict(self.module)
        if self.stage == 3:
            for name in {*self.masters, *self.frozen, *self.tied}:
                module[name] = torch.empty(0, dtype=module[name].dtype)
        else:  # of one buffer, as DeepSpeed leaves them
            for group in self.groups:
                flat = torch.cat([value.reshape(-1) for value in group.values()]).to(self.dtype)
                for name, value in zip(group, flat.split([value.numel() for value in group.values()]), strict=True):
                    module[name] = value.view(group[name].shape)
            module |= {alias: module[name] for alias, name in self.tied.items()}
        shapes = [OrderedDict((name, value.shape) for name, value in group.items()) for group in self.flat_order()]
        fragments = {
            name: self._shares(value)[rank] if self.stage == 3 else value for name, value in self.frozen.items()
        }
        return {
            "module": module,
            "buffer_names": list(self.buffers),
            "optimizer": None,
            "param_shapes": shapes if self.stage else None,
            "frozen_param_shapes": OrderedDict((n, v.shape) for n, v in self.frozen.items()) if saves_frozen else None,
            "shared_params": dict(self.tied) if rank == 0 else {},
            "frozen_param_fragments": OrderedDict(fragments) if saves_frozen else None,
            "lr_scheduler": {"last_epoch": 2},
            "skipped_steps": 0,
            "global_steps": 2,
            "global_samples": 4,
            "dp_world_size": self.world,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": max(self.stage, 0)}},
            "ds_version": VERSION,
            **self.client,
        }

    def _steps(self) -> dict[str, Any]:
        if self.step is None:
            return {}
        return {"step": torch.tensor(self.step) if isinstance(self.step, float) else self.step}

    def _plain_optimizer(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups = []
        for group in self.groups:
            groups.append({"lr": 0.01, "params": list(range(len(state), len(state) + len(group)))})
            for name in group:
                state[len(state)] = {**self._steps(), **{what: self.moment(name, what) for what in self.moments}}
        return {"state": state, "param_groups": groups}

    def _values(self, what: str, group: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(group) if what == "fp32" else {name: self.moment(name, what) for name in group}

    # Stages 1 and 2.

    def _joined(self) -> list[dict[str, Any]]:
        states: list[dict[str, Any]] = [
            {
                "loss_scaler": LossScaler(),
                "overflow": False,
                "clip_grad": 1.0,
                "base_optimizer_state": [] if self.elastic else {"state": {}, "param_groups": []},
                "single_partition_of_fp32_groups": [],
                "zero_stage": ZeroStageEnum(max(self.stage, 1)),
                "group_paddings": [],
                "param_alignment_paddings": [],
                "partition_count": [self.world] * len(self.groups),
                "ds_version": VERSION,
                "param_slice_mappings": [],
            }
            for _ in range(self.world)
        ]
        for number, group in enumerate(self.flat_order()):
            behind = self._paddings(group)
            for state in states if self._steps() or self.elastic else ():
                self._kept(state, number)
            for what in ("fp32", *self.moments):
                flat, used = self._flat(self._values(what, group), behind)
                for rank, part in enumerate(flat.split(len(flat) // self.world)):
                    lean = part[: max(min(used - rank * len(part), len(part)), 0)].clone()
                    if what != "fp32":
                        self._kept(states[rank], number)[what] = lean if self.elastic else part.clone()
                        continue
                    states[rank]["single_partition_of_fp32_groups"].append(part.clone() if self.stage < 0 else lean)
                    states[rank]["group_paddings"].append(len(part) - len(lean))
                    states[rank]["param_alignment_paddings"].append(behind)
                    states[rank]["param_slice_mappings"].append(OrderedDict(wrong=fragment_address(1, 0)))
            for state in states if not self.elastic else ():
                groups = state["base_optimizer_state"]["param_groups"]
                groups.append({"lr": 0.01, "betas": (0.9, 0.99), "params": [number]})
        for state in states if self.stage < 0 else ():
            for key in ("zero_stage", "param_alignment_paddings", "loss_scaler", "overflow"):
                del state[key]
        return states

    def _kept(self, state: dict[str, Any], number: int) -> dict[str, Any]:
        base = state["base_optimizer_state"]
        if not self.elastic:
            return base["state"].setdefault(number, self._steps())  # type: ignore[no-any-return]
        if len(base) == number:
            base.append(self._steps())
        return base[number]  # type: ignore[no-any-return]

    def _paddings(self, group: Mapping[str, torch.Tensor]) -> list[int]:
        elements = 16 // torch.empty(0, dtype=self.dtype).element_size() if self.aligned else 1
        found, at = [], 0
        for number, value in enumerate(group.values()):
            at += value.numel()
            found.append(0 if number == len(group) - 1 else -at % elements)
            at += found[-1]
        return found

    def _flat(self, values: Mapping[str, torch.Tensor], behind: Sequence[int]) -> tuple[torch.Tensor, int]:
        parts = []
        for value, padding in zip(values.values(), behind, strict=True):
            parts += [value.reshape(-1).float(), torch.full((padding,), PADDING)]
        used = sum(map(len, parts))
        return torch.cat([*parts, torch.full((-used % (2 * self.world),), PADDING)]), used

    # Stage 3.

    def _shares(self, value: torch.Tensor) -> list[torch.Tensor]:
        per = self._share(value)
        padded = torch.cat(
            [value.reshape(-1), torch.full((per * self.world - value.numel(),), PADDING).to(value.dtype)]
        )
        return [padded[rank * per : (rank + 1) * per].clone() for rank in range(self.world)]

    def _split(self) -> list[dict[str, Any]]:
        flats = self.flat_order()
        states = []
        for rank in range(self.world):
            buffers: dict[str, list[torch.Tensor]] = {}
            for group in flats:
                for what in ("fp32", *self.moments):
                    values = self._values(what, group).values()
                    buffers.setdefault(what, []).append(torch.cat([self._shares(v)[rank].float() for v in values]))
            for number, flat in enumerate(buffers["fp32"]):
                flat.ds_id = number  # type: ignore[attr-defined]
            kept = [{**self._steps(), **{w: buffers[w][n] for w in self.moments}} for n in range(len(flats))]
            numbers = iter(range(len(flats)))
            groups = [
                {"lr": 0.01, "params": [next(numbers) for _ in self._sub_groups(dict(group))]} for group in self.groups
            ]
            states.append(
                {
                    "zero_stage": ZeroStageEnum.weights,
                    "loss_scaler": LossScaler(),
                    "overflow": False,
                    "partition_count": self.world,
                    "optimizer_state_dict": {"state": dict(enumerate(kept)), "param_groups": groups},
                    "fp32_flat_groups": buffers["fp32"],
                }
            )
        return states


def hash_of(text: str) -> int:
    """The same in every run."""
    return int.from_bytes(text.encode()[-6:], "little") + len(text)


def random_zero(seed: int) -> Zero:
    """A model and a way to spread it, drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    def shape() -> tuple[int, ...]:
        return tuple(1 + draw(7) for _ in range(draw(4)))

    def value() -> torch.Tensor:
        return torch.randn(shape(), generator=generator)

    stage = (-1, 1, 2, 3)[draw(4)]
    dtype = (torch.bfloat16, torch.float16, torch.float32)[draw(3)] if stage > 0 else torch.bfloat16
    groups = [{f"g{n}.m{m}.weight": value() for m in range(1 + draw(6))} for n in range(1 + draw(3))]
    named = [name for group in groups for name in group]
    return Zero(
        groups=groups,
        stage=stage,
        world=1 + draw(5),
        dtype=dtype,
        buffers={"running": value(), "count": torch.tensor(draw(100)), "mask": value() > 0},
        frozen={f"frozen.m{m}.weight": value().to(dtype) for m in range(draw(3))},
        tied={"tied.weight": named[draw(len(named))]} if draw(2) else {},
        sub_group=1 + draw(60),
        aligned=stage in (1, 2) and bool(draw(2)),
        elastic=stage in (1, 2) and draw(3) == 0,
        round_robin=stage in (1, 2) and bool(draw(2)),
        moments=(("exp_avg", "exp_avg_sq"), ("momentum_buffer",), ())[draw(3)],
        step=(2.0, 2, None)[draw(3)],
    )
