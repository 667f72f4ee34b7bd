"""Each finding has a checkpoint that provokes it, and one that just does not."""

from __future__ import annotations

import argparse
import builtins
import codecs
import os
import shlex
import warnings
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.checkpoint import Checkpoint, GlobalUse, Origin, Replica, StateDict
from ckptkit.codes import CODES
from ckptkit.diagnose import DIAGNOSES, diagnose, human_size
from ckptkit.pickling.inert import Global, InertDict, Object
from ckptkit.pickling.trust import assess
from ckptkit.report import Finding

Save = Callable[..., Path]


class Naming:
    """Pickles as a call of a function, which reading must not make."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class Marked(Naming):
    """Pickles as a call whose result a setter is then given: one that has attributes, or bytes, that have none."""

    def __reduce__(self) -> Any:
        return self.function, self.args, 1, None, None, print


def findings(path: Path) -> dict[str, Finding]:
    with ckptkit.open(path) as file:
        found = file.findings
    assert {finding.code for finding in found} <= set(CODES)
    assert len({finding.code for finding in found}) == len(found)
    return {finding.code: finding for finding in found}


WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
SHARED = torch.arange(6.0)
NOT_TENSOR = {"w": torch.ones(1), "steps": 3}


def stale(prefix: str) -> dict[str, Any]:
    """The state_dict of a wrapped model, its names (but not its module versions) changed by hand."""
    state = nn.Sequential(nn.Linear(1, 1)).state_dict(prefix="module.")
    renamed = type(state)((prefix + name.removeprefix("module."), value) for name, value in state.items())
    renamed._metadata = state._metadata  # type: ignore[attr-defined]
    return renamed


def noted(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with another as an attribute."""
    tensor.mask = torch.ones(3)  # type: ignore[attr-defined]
    return tensor


PROVOKED: dict[str, tuple[Any, Any]] = {
    # code: (one that provokes it, one that just does not)
    "ambiguous-section": (
        {"model": WEIGHTS, "ema": {name: tensor.clone() for name, tensor in WEIGHTS.items()}},
        {"model": WEIGHTS, "ema": None},
    ),
    "bound-method": (nn.Linear(1, 1).state_dict, nn.Linear(1, 1).state_dict()),
    "whole-model": (nn.Linear(1, 1), nn.Linear(1, 1).state_dict()),
    "wrapped-model": (nn.DataParallel(nn.Linear(1, 1)), nn.Linear(1, 1)),
    "no-tensors": ({"epoch": 3}, {"epoch": torch.tensor(3)}),
    "training-state": ({"model": WEIGHTS, "moments": torch.ones(9)}, {"model": WEIGHTS, "epoch": 3}),
    "not-a-plain-tensor": (NOT_TENSOR, {"w": torch.ones(1)}),
    "module-prefix": ({"module.w": torch.ones(1)}, {"my_module.w": torch.ones(1), "a.module.w": torch.ones(2)}),
    "inner-module": ({"features.module.0.w": torch.ones(1)}, {"module.a.w": torch.ones(1), "b.module": torch.ones(1)}),
    "foreign-objects": ({"model": WEIGHTS, "args": argparse.Namespace()}, {"model": WEIGHTS, "args": {"lr": {1, 2}}}),
    "hostile-name": ({"model": WEIGHTS, "x": Naming(os.system, "true")}, {"model": WEIGHTS, "x": Naming(abs, -1)}),
    "tied-tensors": ({"a": SHARED, "b": SHARED}, {"a": SHARED, "b": SHARED.clone()}),
    "shared-storage": ({"a": SHARED[:3], "b": SHARED[3:]}, {"a": SHARED, "b": SHARED}),
    "unused-bytes": ({"a": torch.ones(258)[:2]}, {"a": torch.ones(257)[:2]}),
    "not-contiguous": ({"a": torch.ones(2, 3).T}, {"a": torch.ones(2, 3)[1:], "b": torch.ones(1, 3).T}),
    "stale-versions": (stale(""), stale("module.")),
    "averaged-weights": ({"params": WEIGHTS, "params_ema": WEIGHTS}, {"schema": WEIGHTS, "emai": WEIGHTS}),
    "other-system": ({"model": WEIGHTS, "where": Path("a")}, {"model": WEIGHTS, "where": "a"}),
    "discarded-call": (
        {"model": WEIGHTS, "x": Marked(codecs.encode, "x", "latin1")},
        {"model": WEIGHTS, "x": Marked(argparse.Namespace)},
    ),
    "other-parts": (
        {"model": WEIGHTS, "generator": {"up.weight": torch.ones(2, 2)}},
        {"model": WEIGHTS, "best": {"fc.weight": torch.zeros(2, 3)}},
    ),
    "outside-sections": ({"w": noted(torch.ones(2))}, {"w": torch.ones(2), "x": torch.ones(1)}),
    "not-a-model": (WEIGHTS, {"model": WEIGHTS, "epoch": 3}),
    "quantized-weights": (
        {"w.weight": torch.ones(2, 2, dtype=torch.int8), "w.weight_scale": torch.ones(2)},
        {"w.weight": torch.ones(2, 2), "w.weight_scale": torch.ones(2), "ids": torch.ones(2, dtype=torch.int8)},
    ),
}


@pytest.mark.parametrize("code", PROVOKED)
def test_provoked_and_just_not(save: Save, code: str) -> None:
    provoking, harmless = PROVOKED[code]
    found = findings(save(provoking))
    assert code in found
    assert found[code].message
    assert code not in findings(save(harmless))


def test_device_location(save: Save) -> None:
    tensors = [torch.ones(i + 1) for i in range(3)]
    found = findings(save(tensors, device=lambda s: {4: "cuda:1", 8: "cuda:0", 12: "cuda:1"}[s.nbytes()]))
    assert "cuda:0 (1), cuda:1 (2)" in found["device-location"].message
    assert "--map-location cpu" in (found["device-location"].fix or "")
    assert "device-location" not in findings(save(tensors))


def test_a_device_anywhere_in_the_file(save: Save) -> None:
    for saved in (
        {"model": WEIGHTS, "x": {"y": {torch.ones(5)}}},
        {"w": noted(torch.ones(2))},
        [torch.ones(5).untyped_storage()],
    ):
        found = findings(save(saved, device=lambda s: "cuda:0" if s.nbytes() in (20, 12) else "cpu"))
        assert "cuda:0 (1)" in found["device-location"].message


def test_crc_not_recorded(save: Save, without_checksums: Callable[[], AbstractContextManager[None]]) -> None:
    with without_checksums():
        path = save(WEIGHTS)
    assert "crc-not-recorded" in findings(path)
    assert "crc-not-recorded" not in findings(save(WEIGHTS))


def test_big_endian() -> None:
    origin = Origin(path="a.pth", size=10, format="torch-zip", kind="other", byteorder="big")
    checkpoint = Checkpoint(state_dict=StateDict(), rest=None, origin=origin)
    assert [f.code for f in diagnose(checkpoint)] == ["no-tensors", "big-endian"]


def test_what_a_folder_leaves_for_later() -> None:
    class Pickles:
        def judge(self) -> tuple[GlobalUse, ...]:
            return ()

    origin = Origin(path="a b", size=10, format="dcp", kind="other", options=("--section", "x", "--tag", "step 1"))
    unread = GlobalUse(name="items", verdict="unknown", count=3, kind="unread")
    copies: Any = (Replica("w", *[None] * 2, "rank 0 and rank 1"),)  # type: ignore[arg-type]  # nothing is read
    checkpoint = Checkpoint(
        state_dict=StateDict(), rest=None, origin=origin, unread=Pickles(), unvouched=(unread,), replicas=copies
    )
    found = {finding.code: finding for finding in diagnose(checkpoint)}
    assert found["items-not-read"].message.startswith("3 items are separate pickles and were not read;")
    assert found["copies-not-compared"].message.startswith("1 copy was not compared")
    assert found["items-not-read"].fix == "ckptkit check 'a b' --tag 'step 1'"


def test_every_code_a_diagnosis_gives_is_provoked_here() -> None:
    here = {*PROVOKED, "device-location", "crc-not-recorded", "big-endian", "items-not-read", "copies-not-compared"}
    from_conversion = {"left-out", "renamed", "nothing-to-strip", "mixed-prefix", "written-out"}
    given = {const for check in DIAGNOSES for const in check.__code__.co_consts if const in CODES}
    assert len(DIAGNOSES) == 23
    assert given <= here
    assert not here & from_conversion


def test_the_gravest_come_first(save: Save) -> None:
    saved = {"model": {"module.w": torch.ones(1)}, "x": Naming(os.system, "true"), "y": torch.ones(3)}
    with ckptkit.open(save(saved)) as file:
        severities = [finding.severity for finding in file.findings]
    assert severities == ["error", "warning", "info"]


# What they say.


def test_hostile_names_run_nothing(save: Save, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = save({"model": WEIGHTS, "x": Naming(os.system, f"touch {proof}"), "y": Naming(builtins.eval, "1/0")})
    with ckptkit.open(path) as file:
        assert file.trust == "hostile"
        errors = [finding for finding in file.findings if finding.severity == "error"]
        assert {finding.code for finding in errors} == {"hostile-name"}
        assert any(f"{os.system.__module__}.system" in finding.message for finding in errors)
        assert any("builtin" in finding.message and "eval" in finding.message for finding in errors)
        assert list(file.state_dict) == list(WEIGHTS)
    assert not proof.exists()


def test_foreign_objects_say_where(save: Save) -> None:
    found = findings(save({"model": WEIGHTS, "args": argparse.Namespace(), "when": [Path("a")]}))
    message = found["foreign-objects"].message
    assert "argparse.Namespace in 'args'" in message
    assert "Path in 'when'" in message
    assert "--weights-only" in (found["foreign-objects"].fix or "")
    assert findings(save(argparse.Namespace()))["foreign-objects"].fix is None


def test_prefixes_say_which_and_how_many(save: Save) -> None:
    found = findings(save({"module.a": torch.ones(1), "b": torch.ones(1), "module.c": torch.ones(1)}))
    assert "2 of 3 names" in found["module-prefix"].message
    assert "`module.`" in found["module-prefix"].message
    found = findings(save({"model._orig_mod.a": torch.ones(1)}))
    assert "`_orig_mod.`" in found["module-prefix"].message


def test_a_wrapped_whole_model_is_said_once(save: Save) -> None:
    assert set(findings(save(nn.DataParallel(nn.Linear(1, 1))))) == {"whole-model", "wrapped-model"}
    assert set(findings(save(nn.DataParallel(nn.Linear(1, 1)).state_dict))) == {"bound-method", "wrapped-model"}


def test_ties_and_shared_storages(save: Save) -> None:
    base = torch.arange(10.0)
    saved = {"a": base, "b": base, "c": base[1:], "d": base.view(2, 5), "e": torch.ones(1), "f": torch.ones(0)}
    found = findings(save(saved))
    assert found["tied-tensors"].message == "1 tensor has several names: a = b"
    assert found["shared-storage"].message == "3 tensors are different views of shared storages"


def test_empty_tensors_are_not_tied(save: Save) -> None:
    empty = torch.ones(0)
    assert set(findings(save({"a": empty, "b": empty, "c": empty[:, None]}))) == {"not-a-model"}


def test_unused_bytes_are_counted_once(save: Save) -> None:
    base = torch.ones(10_000)
    found = findings(save({"a": base[:10], "b": base[5:20], "c": base[9_000:9_001]}))
    assert "39.9 kB" in found["unused-bytes"].message  # 40,000 less the 84 that are covered
    assert "unused-bytes" not in findings(save({"model": {"a": base[:10]}, "other": [base[10:]]}))
    assert "unused-bytes" not in findings(save([base[:10], base[10:]]))


def test_a_bare_storage_is_used(save: Save) -> None:
    base = torch.ones(10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # typed storages are deprecated, and in many files
        path = save([base.storage(), base[:1]])
    assert "unused-bytes" not in findings(path)


def test_training_state_counts_what_is_not_weights(save: Save) -> None:
    weights = torch.ones(1000)
    found = findings(save({"model": {"w": weights}, "again": [weights], "moments": [torch.ones(2000)]}))
    assert found["training-state"].message.startswith("8 kB (")
    assert "training-state" not in findings(save({"model": {"w": weights}, "again": [weights[:3]]}))


def test_fixes_are_commands_for_this_file(save: Save) -> None:
    path = save({"module.w": torch.ones(1)}, "a file's name.pth")
    fix = findings(path)["module-prefix"].fix
    assert fix is not None
    assert fix.startswith("ckptkit convert '")
    assert fix.endswith("--strip-module")


def test_what_is_tied_to_other_systems_is_named(save: Save) -> None:
    message = findings(save({"model": WEIGHTS, "mean": numpy.ones(3), "where": Path("a")}))["other-system"].message
    assert "paths of an operating system (pathlib." in message
    assert "arrays of numpy" in message


def test_averaged_weights_name_both(save: Save) -> None:
    found = findings(save({"generator": WEIGHTS, "ema": {"generator": WEIGHTS}}))["averaged-weights"]
    assert "'ema.generator' beside raw ones in 'generator'" in found.message
    assert "--section ema.generator" in (found.fix or "")
    assert "averaged-weights" not in findings(save({"ema": WEIGHTS}))


# Trees that explode.


def checkpoint(rest: object) -> Checkpoint:
    origin = Origin(path="a.pth", size=10, format="torch-zip", kind="collection")
    return Checkpoint(state_dict=StateDict(), rest=rest, origin=origin, globals=(assess(Global("m", "N")),))


def test_shared_and_deep_trees_are_walked_once() -> None:
    node: object = Object("newobj", Global("m", "N"), ())
    for _ in range(100):
        node = InertDict([("a", node), ("b", node)])
    deep: object = node
    for _ in range(20_000):
        deep = [deep]
    many = InertDict([(f"k{i}", [deep, i]) for i in range(10_000)])
    (finding,) = diagnose(checkpoint(many))
    assert "m.N in 'k0'" in finding.message
    cyclic: list[object] = [Object("newobj", Global("m", "N"), ())]
    cyclic.append(cyclic)
    (finding,) = diagnose(checkpoint(InertDict([("self", cyclic)])))
    assert "m.N in 'self'" in finding.message


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (999_499, "999 kB"),
        (999_500, "1 MB"), (44_800_000, "44.8 MB"), (1_500_000_000, "1.5 GB"), (2_000_000_000_000, "2 TB"),
    ],
)  # fmt: skip
def test_human_size(nbytes: int, text: str) -> None:
    assert human_size(nbytes) == text


# What is advised is done by what is advised.


def peft(names: str = "base_model.model.{}.q_proj.lora_{}.weight") -> dict[str, torch.Tensor]:
    return {names.format(layer, side): torch.ones(2, 2) for layer in range(3) for side in "AB"}


@pytest.mark.parametrize(
    ("saved", "what", "loads"),
    [
        (peft(), "an adapter", "peft.PeftModel.from_pretrained(base_model, "),
        (peft("unet.mid.{}.to_q.lora.up.{}"), "an adapter", "pipeline.load_lora_weights("),
        (peft("lora_unet_mid_{}.lora_down.{}"), "an adapter", "pipeline.load_lora_weights("),
        (peft("layers.{}.lora_{}"), "an adapter", "strict=False)"),
        (peft("blocks.{}.hada_w1_a.{}"), "an adapter", "strict=False)"),
        ({"<cat-toy>": torch.ones(768)}, "a textual inversion", "pipeline.load_textual_inversion("),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "a textual inversion", "textual_inversion("),
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(8, 768)}, "name": "cat", "step": 5},
         "a textual inversion", "pipeline.load_textual_inversion("),
        ({"x": torch.ones(9, 3), "y": torch.ones(9)}, "a data set", "data = ckptkit.load_state_dict("),
        ({"input_ids": torch.ones(9, 3), "attention_mask": torch.ones(9, 3)}, "a data set", "data = "),
        ({"Images": torch.ones(9, 3), "labels": torch.ones(9)}, "a data set", "data = "),
        (WEIGHTS, "build the model, then load these into it", "model.load_state_dict("),
        ({"floral.weight": torch.ones(2), "x": torch.ones(2)}, "build the model", "model.load_state_dict("),
    ],
)  # fmt: skip
def test_what_has_names_and_tensors_is_told_with_what_loads_it(save: Save, saved: Any, what: str, loads: str) -> None:
    finding = findings(save(saved))["not-a-model"]
    assert what in finding.message
    assert loads in (finding.fix or "")


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), dtype=torch.qint8)


@pytest.mark.parametrize(
    "saved",
    [
        quantized(),
        nn.DataParallel(quantized()),
        quantized().state_dict,
        {"model": {"module.w": torch.ones(1), "_extra_state": {"v": 1}}, "args": argparse.Namespace(lr=1)},
        {"module.c": torch.ones(2, dtype=torch.complex128), "module.w": torch.ones(5000)[:2]},
    ],
    ids=["whole", "wrapped", "method", "extra state", "complex"],
)
def test_no_fix_is_advised_that_is_refused(save: Save, command: Any, saved: Any) -> None:
    path = save(saved)
    commands = [f.fix for f in findings(path).values() if f.fix and f.fix.startswith("ckptkit convert")]
    assert commands
    for words in commands:
        done = command(*shlex.split(words)[1:], "--dry-run")
        assert done.code == 0, done.err


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


class OwnState(nn.Module):
    """Saves a tuple in place of its attributes; TorchScript reads the types of the comments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    @torch.jit.export
    def __getstate__(self):
        # type: () -> Tuple[Tensor, bool]
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state):
        # type: (Tuple[Tensor, bool]) -> None
        self.weight = state[0]
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


def test_a_program_that_keeps_a_state_of_its_own(command: Any, tmp_path: Path) -> None:
    path = scripted(OwnState(), tmp_path / "own.pt")
    found = findings(path)
    assert "1 module saves custom state (__getstate__), with 1 tensor" in found["own-script-state"].message
    assert "OwnState" in found["torchscript-program"].message
    for output in ("o.pth", "o.safetensors"):
        done = command("convert", path, output)
        assert done.code == 2
        assert "contains 1 tensor without a model's names: its modules save custom state" in done.err
        assert "--section" not in done.err
    assert "a TorchScript program" in command("inspect", path).out


def test_a_frozen_program_is_called_frozen_and_no_other(command: Any, tmp_path: Path) -> None:
    bare = scripted(nn.ReLU(), tmp_path / "bare.pt")
    told = command("convert", bare, "o.pth").err
    assert "it contains no named tensors" in told and "frozen program" not in told
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 2)).eval())).save(str(tmp_path / "frozen.pt"))
    shown = command("inspect", tmp_path / "frozen.pt").out
    assert "unknown class" not in shown
    assert "a TorchScript program of class __torch__.torch.nn.modules.container." in shown
    assert "frozen-program" in shown and "training state" not in shown


def test_a_program_on_a_device_is_loaded_with_torch_jit(tmp_path: Path) -> None:
    path = scripted(nn.Linear(2, 2), tmp_path / "cpu.pt")
    target = tmp_path / "cuda.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            tagged = source.read(name).replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
            out.writestr(name, tagged if name.endswith("data.pkl") else source.read(name))
    finding = findings(target)["device-location"]
    assert "cuda:0" in finding.message and "torch.load" not in finding.message
    assert finding.fix == f"torch.jit.load({str(target)!r}, map_location='cpu')"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(target, map_location="cpu")
    assert loaded.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("saved", "is_training"),
    [
        ({"state_dict": WEIGHTS, "name": "net", "params": {"hidden": 2, "epochs": 9}}, False),
        ({"model": WEIGHTS, "config": {"lr": 0.1}, "classes": ["a", "b"]}, False),
        ({"state_dict": WEIGHTS, "epoch": 3}, True),
        ({"state_dict": WEIGHTS, "global_step": 3}, True),
        ({"model": WEIGHTS, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}}, True),
    ],
)
def test_weights_with_settings_are_no_training_checkpoint(
    save: Save, command: Any, saved: Any, is_training: bool
) -> None:
    shown = command("inspect", save(saved)).out
    assert ("a training checkpoint" in shown, "\ntraining state\n" in shown) == (is_training, is_training)
    assert ("weights, with settings" in shown) != is_training


def test_thousands_of_sections_are_told_in_a_few_words(save: Save, command: Any) -> None:
    path = save([{"w": torch.ones(1), "i": i} for i in range(2000)])
    for arguments in (["inspect"], ["convert"], ["diff"]):
        done = command(*arguments, path, *([] if arguments == ["inspect"] else ["o.safetensors"]))
        assert max(map(len, (done.out + done.err).splitlines())) < 1000
    assert "and 1,980 more" in command("convert", path, "o.safetensors").err
