"""Resume dicts as training frameworks save them: what is listed, and what is taken for the model."""

from __future__ import annotations

import argparse
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import Save, codes, sections
from torch import nn

import ckptkit
from ckptkit import formats
from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict
from ckptkit.errors import SectionError
from ckptkit.normalize.shapes import CUSTOMARY_KEYS
from ckptkit.pickling.inert import mapping_items

Opened = Callable[..., AbstractContextManager[Checkpoint]]
SameWeights = Callable[[StateDict, dict[str, torch.Tensor]], None]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def adam(model: nn.Module) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    return optimizer


MODEL, OTHER = net(), net()
SD, COPY = MODEL.state_dict(), OTHER.state_dict()
ADAM = adam(net())
OPT = ADAM.state_dict()
AUX = {"c": torch.ones(2)}
RANDOM = torch.get_rng_state()


def prefixed(prefix: str, state_dict: Any = SD) -> Any:
    return OrderedDict((prefix + name, tensor) for name, tensor in state_dict.items())


@pytest.mark.parametrize("key", CUSTOMARY_KEYS)
@pytest.mark.parametrize("as_module", [False, True])
def test_weights_under_every_customary_key(
    save: Save, opened: Opened, same_weights: SameWeights, key: str, as_module: bool
) -> None:
    saved = {
        "epoch": 3,
        "codebook": {"embedding": torch.ones(2, 2)},  # looks like weights, under no customary key
        key: MODEL if as_module else SD,
        "optimizer": OPT,
        "args": argparse.Namespace(lr=0.1),
    }
    with opened(save(saved)) as checkpoint:
        assert checkpoint.origin.kind == "resume"
        assert checkpoint.origin.state_path == key
        same_weights(checkpoint.state_dict, SD)
        assert sections(checkpoint) == [
            ("codebook", "state_dict", False),
            (key, "whole_model" if as_module else "state_dict", True),
            ("optimizer", "optimizer", False),
        ]
        rest = dict(mapping_items(checkpoint.rest) or [])
        assert list(rest) == ["epoch", "codebook", key, "optimizer", "args"]
        assert rest[key] is STATE_DICT
        assert rest["epoch"] == 3


Metrics = namedtuple("Metrics", "loss accuracy")

SELECTED: dict[str, tuple[str, Any]] = {
    "the only one": ("my_net", {"epoch": 1, "my_net": SD}),
    "nested": ("checkpoint.inner.state_dict", {"checkpoint": {"inner": {"state_dict": SD}}, "n": 1}),
    "four keys down": ("a.b.c.d", {"a": {"b": {"c": {"d": SD}}}}),
    "a key with a dot": ("model.state_dict", {"model.state_dict": SD, "teacher": {"t": torch.ones(2)}}),
    "a dict in a dict": ("model.state_dict", {"model": {"state_dict": SD}, "loss": {"state_dict": AUX}}),
    "an envelope": ("checkpoint.model", {"checkpoint": {"model": SD, "ema_rate": 0.9}, "probe": {"t": torch.ones(2)}}),
    "in a list": ("0", [MODEL, "text"]),
    "in a tuple": ("1", (3, SD)),
    "lightning": (
        "state_dict",
        {
            "epoch": 1,
            "global_step": 10,
            "pytorch-lightning_version": "2.0",
            "state_dict": prefixed("model."),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
            "callbacks": {
                "ModelCheckpoint{'monitor': None}": {
                    "best_model_score": torch.tensor(0.5),
                    "best_model_path": "a/b.ckpt",
                    "best_k_models": {"a/b.ckpt": torch.tensor(0.5)},
                    "current_score": torch.tensor(0.5),
                }
            },
            "optimizer_states": [OPT],
            "lr_schedulers": [{"last_epoch": 3}],
            "hyper_parameters": {"lr": 0.1},
        },
    ),
    "fairseq": (
        "model",
        {
            "args": argparse.Namespace(arch="transformer"),
            "cfg": None,
            "model": SD,
            "criterion": OrderedDict(),
            "optimizer_history": [{"criterion_name": "ce", "num_updates": 3, "best_loss": 1.5}],
            "task_state": {},
            "extra_state": {
                "metrics": {"train": [(10, "loss", "AverageMeter", {"val": torch.tensor(1.0)})]},
                "train_iterator": {"epoch": 2},
                "val_loss": torch.tensor(1.5, dtype=torch.float64),
            },
            "last_optimizer_state": OPT,
        },
    ),
    "mmengine": (
        "state_dict",
        {
            "meta": {"experiment_name": "x", "time": "now"},
            "state_dict": prefixed("backbone."),
            "message_hub": {"log_scalars": {"train/loss": {"values": torch.tensor([1.0, 2.0])}}, "runtime_info": {}},
            "optimizer": OPT,
            "param_schedulers": [{"last_step": 3}],
        },
    ),
    "detectron2": ("model", {"model": SD, "optimizer": OPT, "scheduler": {"last_epoch": 1}, "iteration": 5}),
    "deepspeed": (
        "module",
        {
            "module": SD,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in SD.items())],
            "lr_scheduler": None,
            "ds_config": {"zero_optimization": {"stage": 0}},
        },
    ),
    "fastai": (
        "model",
        {
            "model": SD,
            "opt": {"state": [{"grad_avg": torch.ones(2), "sqr_avg": torch.ones(2), "step": 3}] * 2, "hypers": [{}]},
        },
    ),
    "esrgan, EMA only": ("params_ema", {"params_ema": SD}),
    "yolo": (
        "model",
        {"epoch": -1, "best_fitness": None, "model": MODEL, "ema": None, "optimizer": None, "train_args": {"lr0": 0.1}},
    ),
    "losses beside it": ("my_net", {"my_net": SD, "losses": {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}}),
    "random states beside it": ("my_net", {"my_net": SD, "rng": {"cpu": RANDOM, "cuda": RANDOM}}),
    "moments beside it": ("net", {"net": SD, "optim": {"w": {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}}),
    "the model and its state_dict": ("state_dict", {"network": MODEL, "state_dict": MODEL.state_dict()}),
    "the method and the model": ("state_dict", {"network": MODEL, "state_dict": MODEL.state_dict}),
    "a view of some of it": ("model", {"model": SD, "head": {"bias": torch.ones(2)}}),
    "one number": ("model", {"model": {"temperature": torch.tensor(1.0)}, "losses": {"a": torch.tensor(1.0)}}),
    "under another name of one list": ("best.0", {"best": [SD, 0.5], "metrics": Metrics(torch.tensor(1.0), 0.5)}),
}  # fmt: skip


@pytest.mark.parametrize("case", SELECTED)
def test_what_is_taken_for_the_model(save: Save, opened: Opened, case: str, tmp_path: Path) -> None:
    path, saved = SELECTED[case]
    file = save(saved)
    with opened(file) as checkpoint:
        assert checkpoint.origin.kind == "resume"
        assert checkpoint.origin.state_path == path
        assert [section.path for section in checkpoint.sections if section.selected] == [path]
        assert set(codes(checkpoint)) <= {"bound-method"}
        assert len(checkpoint.state_dict) > 0
        names = list(checkpoint.state_dict)
    # What the section is listed under is what selects it, and nothing else is lost in a .pth.
    with opened(file, section=path) as checkpoint:
        assert list(checkpoint.state_dict) == names
    ckptkit.convert(file, tmp_path / "out.pth")
    with opened(tmp_path / "out.pth") as checkpoint:
        assert checkpoint.origin.state_path is not None
        assert list(checkpoint.state_dict) == names


AMBIGUOUS: dict[str, tuple[list[str], Any]] = {
    "model and ema modules": (["model", "ema"], {"model": MODEL, "ema": OTHER, "epoch": 1}),
    **{
        f"{raw} and {ema}": ([raw, ema], {raw: SD, ema: COPY})
        for raw, ema in (
            ("model", "model_ema"),
            ("state_dict", "state_dict_ema"),
            ("state_dict", "ema_state_dict"),
            ("params", "params_ema"),
            ("module", "module_ema"),
            ("net", "shadow"),
            ("model", "best_model"),
            ("g", "g_ema"),
        )
    },
    "a copy with a wrapper's names": (["state_dict", "ema"], {"state_dict": prefixed("module."), "ema": COPY}),
    "an averaged copy": (
        ["model", "swa"], {"model": SD, "swa": {"n_averaged": torch.tensor(3), **prefixed("module.", COPY)}}
    ),
    "a copy of the parameters alone": (
        ["model", "ema.shadow"], {"model": SD, "ema": {"shadow": {n: t for n, t in COPY.items() if "running" not in n}}}
    ),
    "generator and discriminator": (["generator", "discriminator"], {"generator": SD, "discriminator": prefixed("d.")}),
    "netG and netD": (["netG", "netD"], {"netG": MODEL, "netD": OTHER}),
    "G_ema beside both": (["G", "D", "G_ema"], {"G": SD, "D": prefixed("d."), "G_ema": COPY}),
    "two customary keys": (["model", "net"], {"model": SD, "net": prefixed("x.")}),
    "a list of models": (["0", "1"], [SD, COPY]),
    "student and teacher": (["student", "teacher"], {"student": SD, "teacher": COPY}),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_is_a_choice(save: Save, opened: Opened, case: str) -> None:
    paths, saved = AMBIGUOUS[case]
    file = save(saved)
    with opened(file) as checkpoint:
        assert checkpoint.origin.kind == "resume"
        assert checkpoint.origin.state_path is None
        assert len(checkpoint.state_dict) == 0
        assert [section.path for section in checkpoint.sections] == paths
        (finding,) = checkpoint.findings
        assert finding.code == "ambiguous-section"
        assert all(f"{path!r} (" in finding.message for path in paths)
        assert " tensor" in finding.message
        assert f"--section {paths[0]}" in (finding.fix or "")
        sizes = {section.path: section.tensors for section in checkpoint.sections}
    for path in paths:
        with opened(file, section=path) as checkpoint:
            assert checkpoint.origin.state_path == path
            assert codes(checkpoint) == []
            assert [s.path for s in checkpoint.sections if s.selected] == [path]
            assert len(checkpoint.state_dict) == sizes[path]


def test_sections_of_frameworks_are_named(save: Save, opened: Opened) -> None:
    listed = {
        "lightning": [("state_dict", "state_dict"), ("callbacks", "collection"), ("optimizer_states.0", "optimizer")],
        "fairseq": [("model", "state_dict"), ("extra_state", "collection"), ("last_optimizer_state", "optimizer")],
        "mmengine": [
            ("state_dict", "state_dict"),
            ("message_hub.log_scalars.train/loss", "state_dict"),
            ("optimizer", "optimizer"),
        ],
        "losses beside it": [("my_net", "state_dict"), ("losses", "collection")],
        "fastai": [("model", "state_dict"), ("opt", "optimizer")],
        "moments beside it": [("net", "state_dict"), ("optim", "collection")],
    }
    for case, expected in listed.items():
        with opened(save(SELECTED[case][1])) as checkpoint:
            assert [(section.path, section.kind) for section in checkpoint.sections] == expected


def test_too_deep_for_a_section(save: Save, opened: Opened) -> None:
    with opened(save({"a": {"b": {"c": {"d": {"e": SD}}}}})) as checkpoint:
        assert sections(checkpoint) == [("a", "collection", False)]


def test_a_section_that_holds_no_weights(save: Save) -> None:
    path = save({"model": SD, "model_ema": COPY, "optimizer": OPT})
    size = sum(tensor.nbytes for tensor in SD.values())
    sections = rf"sections that do: 'model' \(7 tensors, {size} B\), 'model_ema' \(7 tensors, {size} B\)$"
    with pytest.raises(SectionError, match=rf"no section 'ema' contains weights; {sections}"):
        formats.read(path, section="ema")
    with pytest.raises(
        SectionError, match=rf"section 'optimizer' contains no weights \(it is of kind 'optimizer'\); {sections}"
    ):
        formats.read(path, section="optimizer")


def test_an_optimizer_is_never_the_weights(save: Save, opened: Opened) -> None:
    for name, optimizer in (("state_dict", OPT), ("object", ADAM)):
        path = save({"model": optimizer, "epoch": 1}, f"{name}.pth")
        with opened(path) as checkpoint:
            assert checkpoint.origin.state_path is None
            assert sections(checkpoint) == [("model", "optimizer", False)]
        with pytest.raises(SectionError, match="sections that do: none"):
            formats.read(path, section="model")


def test_many_sections_are_listed_in_short(save: Save, opened: Opened) -> None:
    with opened(save({f"fold{i}": SD for i in range(3)} | {f"net{i}": net().state_dict() for i in range(30)})) as found:
        (finding,) = found.findings
        assert "'net16' (7 tensors" in finding.message
        assert "'net17'" not in finding.message
        assert "and 13 more)" in finding.message
