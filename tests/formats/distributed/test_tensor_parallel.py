"""Slices that are joined by rules: Llama's, those that a file gives, and what is refused for want of a rule."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.megatron import Shape, whole, write_llama, write_ranks

import ckptkit
from ckptkit.errors import CkptkitError, CorruptError, FileAccessError, PartError, UnsupportedError

State = dict[str, torch.Tensor]


def require_same(found: dict[str, torch.Tensor], want: State) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_llama(tmp_path: Path, version: int, ranks: int) -> None:
    state = write_llama(tmp_path, ranks, version=version)
    require_same(ckptkit.load_state_dict(tmp_path), state)
    (tmp_path / "params.json").unlink()  # the norms have the width too
    require_same(ckptkit.load_state_dict(tmp_path), state)
    with ckptkit.open(tmp_path) as file:
        assert (file.format, file.kind) == ("megatron", "state_dict")


def test_one_file_of_llama_is_a_file_like_any_other(tmp_path: Path) -> None:
    state = write_llama(tmp_path, 1)
    require_same(ckptkit.load_state_dict(tmp_path / "consolidated.00.pth"), state)
    with ckptkit.open(tmp_path / "consolidated.00.pth") as file:
        assert file.format == "torch-zip"


def change(path: Path, what: Callable[[Any], object]) -> None:
    state = torch.load(path)
    what(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / "consolidated.01.pth").unlink(), "1 rank is missing before consolidated.03.pth: 1"),
        (lambda f: (f / "consolidated.00.pth").unlink(), "1 rank is missing before consolidated.03.pth: 0"),
        (lambda f: (f / "consolidated.03.pth").unlink(), r"3 files, each with \[8, 2\] of .*some are missing"),
        (lambda f: change(f / "consolidated.02.pth", lambda s: s["norm.weight"].add_(1)),
         "norm.weight .consolidated.00.pth and consolidated.02.pth."),
        (lambda f: change(f / "consolidated.02.pth", lambda s: s.pop("norm.weight")), ": only one has norm.weight"),
        (lambda f: change(f / "consolidated.02.pth", lambda s: s.update({"norm.weight": torch.ones(8)})),
         "not have the same dtype"),
        (lambda f: change(f / "consolidated.02.pth", lambda s: s.update({"output.weight": s["output.weight"][:, :4]})),
         r"output.weight.*the slice \[3, 4\] in consolidated.02.pth does not fit .*split along dimension 0"),
        (lambda f: (f / "params.json").write_text("{"), "params.json is not valid JSON"),
        (lambda f: (f / "params.json").write_text('{"dim": 64}'), "make up a model of width 64"),
    ],
)  # fmt: skip
def test_llama_that_is_not_whole_is_refused(
    tmp_path: Path, run: Run, damage: Callable[[Path], object], text: str
) -> None:
    write_llama(tmp_path / "a", 4)
    damage(tmp_path / "a")
    with pytest.raises(CorruptError, match=text):
        ckptkit.load_state_dict(tmp_path / "a")
    assert run("convert", tmp_path / "a", tmp_path / "out.safetensors").returncode == 2
    assert not (tmp_path / "out.safetensors").exists()


def test_copies_of_llamas_key_heads_are_not_joined(tmp_path: Path) -> None:
    write_llama(tmp_path, 4)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "n_kv_heads": 2}))
    with pytest.raises(
        UnsupportedError, match="2 heads of keys and values on 4 ranks: several ranks have a copy of one"
    ):
        ckptkit.load_state_dict(tmp_path)


# Without a rule.


def write_parts(folder: Path, parts: list[dict[str, Any]], name: str = "part-{}.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        torch.save(part, folder / name.format(number))
    return folder


def rules(path: Path, **how: object) -> Path:
    path.write_text(json.dumps({name.replace("__", "."): value for name, value in how.items()}))
    return path


def test_what_has_no_rule_is_a_copy_or_is_refused(tmp_path: Path) -> None:
    shape = Shape(tp=2, layers=1)
    state = whole(shape)
    folder = write_ranks(tmp_path / "a", shape, state)
    long = torch.randn(40_000)
    for rank in range(2):
        path = folder / f"mp_rank_0{rank}" / "model_optim_rng.pt"
        saved = torch.load(path, weights_only=False)
        saved["model"] |= {"decoder.odd.scale": torch.arange(4.0), "decoder.odd.long": long}
        torch.save(saved, path)
    want = {**state, "decoder.odd.scale": torch.arange(4.0), "decoder.odd.long": long}
    require_same(ckptkit.load_state_dict(folder), want)
    with ckptkit.open(folder) as file:
        told = [finding.message for finding in file.findings if finding.code == "taken-of-one-rank"]
    assert any("2 tensors without a rule" in message for message in told)
    saved["model"]["decoder.odd.long"] = torch.cat([long[:-1], torch.zeros(1)])  # seen where values are read
    torch.save(saved, path)
    with pytest.raises(
        CorruptError,
        match=r"decoder.odd.long .*no rule says how to join it: give one with "
        r"--tp-rules FILE",
    ):
        ckptkit.load_state_dict(folder)
    saved["model"]["decoder.odd.scale"] = torch.arange(4.0) + 1  # seen at once
    torch.save(saved, path)
    with pytest.raises(
        UnsupportedError, match=r"1 tensor: decoder.odd.scale \[4\]; give rules with --tp-rules FILE"
    ) as caught:
        ckptkit.open(folder)
    assert len(caught.value.names) == 1
    given = rules(tmp_path / "rules.json", **{"*.odd.*": 0})
    found = ckptkit.load_state_dict(folder, tp_rules=given)
    assert torch.equal(found["decoder.odd.scale"], torch.tensor([0.0, 1, 2, 3, 1, 2, 3, 4]))


def test_rules_make_one_checkpoint_of_files_that_differ_in_a_number(tmp_path: Path) -> None:
    whole_one = {
        "blocks.0.w13": torch.randn(8, 3), "blocks.0.out": torch.randn(3, 4), "blocks.0.norm": torch.randn(3),
        "embed": torch.randn(6, 3), "steps": torch.tensor(7),
    }  # fmt: skip
    given = rules(tmp_path / "rules.json", **{"*.w13": "swiglu", "*.out": 1, "embed": 0, "*.norm": "replicated"})
    parts = []
    for rank in range(2):
        half = [part.chunk(2)[rank] for part in whole_one["blocks.0.w13"].chunk(2)]
        parts.append({
            "blocks.0.w13": torch.cat(half), "blocks.0.out": whole_one["blocks.0.out"].chunk(2, 1)[rank].clone(),
            "blocks.0.norm": whole_one["blocks.0.norm"], "embed": whole_one["embed"].chunk(2)[rank].clone(),
            "steps": whole_one["steps"],
        })  # fmt: skip
    folder = write_parts(tmp_path / "a", parts)
    require_same(ckptkit.load_state_dict(folder, tp_rules=given), whole_one)
    optimizer = {"state": {0: {"exp_avg": torch.randn(3)}}}
    nested = [{"model": part, "epoch": 3, "optimizer": optimizer} for part in parts]
    folder = write_parts(tmp_path / "b", nested, "rank_{}.ckpt")
    (folder / "rng_state_0.pth").write_bytes(b"x")
    (folder / "rng_state_1.pth").write_bytes(b"x")
    everything = ckptkit.load(folder, tp_rules=given)
    assert [*everything] == ["epoch", "model"]
    require_same(everything["model"], whole_one)
    with ckptkit.open(folder, tp_rules=given) as file:
        assert any(finding.code == "not-merged" and "optimizer" in finding.message for finding in file.findings)
    write_parts(folder, [nested[0], {**nested[1], "epoch": 4}], "rank_{}.ckpt")
    with pytest.raises(CorruptError, match=r"says epoch 3, rank_1.ckpt says 4"):
        ckptkit.load(folder, tp_rules=given)


def test_deepspeed_with_tensor_parallelism(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    given = rules(tmp_path / "rules.json", **{"fc.weight": 0})
    parts = [
        {"module": {"fc.weight": half.clone()}, "mp_world_size": 2, "dp_world_size": 1, "global_steps": 5}
        for half in weight.chunk(2)
    ]
    folder = write_parts(tmp_path / "run" / "global_step5", parts, "mp_rank_0{}_model_states.pt")
    (tmp_path / "run" / "latest").write_text("global_step5")
    require_same(ckptkit.load_state_dict(tmp_path / "run", tp_rules=given), {"fc.weight": weight})
    written = tmp_path / "resume.pth"
    assert ckptkit.convert(folder, written, tp_rules=given).ok
    require_same(ckptkit.load_state_dict(written), {"fc.weight": weight})  # and it is no part of anything
    write_parts(folder, [{**part, "mp_world_size": 3} for part in parts], "mp_rank_0{}_model_states.pt")
    with pytest.raises(CorruptError, match="says mp_world_size 3, but there are 2 files"):
        ckptkit.load_state_dict(folder, tp_rules=given)


def test_deepspeed_pipeline_with_tensor_parallelism(tmp_path: Path) -> None:
    state = {f"{layer}.{name}": torch.randn(4, 6) for layer in range(3) for name in ("up.weight", "down.weight")}
    state |= {f"{layer}.norm.weight": torch.randn(6) for layer in range(3)}
    given = rules(tmp_path / "rules.json", **{"*.up.weight": 0, "*.down.weight": 1, "*.norm.*": "replicated"})
    folder = tmp_path / "run" / "global_step5"
    folder.mkdir(parents=True)
    for layer, rank in itertools.product(range(3), range(2)):
        own = {name.removeprefix(f"{layer}."): value for name, value in state.items() if name.startswith(f"{layer}.")}
        own["up.weight"] = own["up.weight"].chunk(2)[rank].clone()
        own["down.weight"] = own["down.weight"].chunk(2, 1)[rank].clone()
        torch.save(own, folder / f"layer_0{layer}-model_0{rank}-model_states.pt")
    for rank in range(4):
        said = {"pp_degree": 2, "tp_degree": 2, "dp_degree": 1}
        torch.save(
            {
                "module": None,
                "mp_world_size": 4,
                "dp_world_size": 3,
                "global_steps": 5,
                "checkpoint_parallel_dimensions": said,
            },
            folder / f"mp_rank_0{rank}_model_states.pt",
        )
    (tmp_path / "run" / "latest").write_text("global_step5")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    require_same(ckptkit.load_state_dict(tmp_path / "run", tp_rules=given), state)
    with ckptkit.open(folder, tp_rules=given) as file:
        assert file.checkpoint.origin.spread is not None and file.checkpoint.origin.spread.world_size == 12
        assert any("zero_pp_rank_0" in finding.message for finding in file.findings if finding.code == "not-merged")
    written = tmp_path / "resume.pth"
    assert ckptkit.convert(folder, written, tp_rules=given).ok
    require_same(ckptkit.load_state_dict(written), state)
    (folder / "layer_01-model_01-model_states.pt").unlink()
    with pytest.raises(CorruptError, match="1 file missing: rank 1 of layer 1"):
        ckptkit.load_state_dict(folder, tp_rules=given)


def test_any_cut_by_any_rules(tmp_path: Path) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        ranks = rng.choice((2, 3, 4))
        state: State = {}
        how: dict[str, object] = {}
        parts: list[State] = [{} for _ in range(ranks)]
        for number in range(6):
            name, dims = f"layer{number}.w", rng.randint(1, 3)
            size = [rng.randint(1, 3) * 2 * ranks for _ in range(dims)]
            state[name] = torch.randn(*size).to(rng.choice((torch.float32, torch.bfloat16, torch.float64)))
            how[name] = rng.choice(("replicated", "swiglu", *range(dims)))
            for rank, part in enumerate(parts):
                own = state[name]
                if how[name] == "swiglu":
                    own = torch.cat([half.chunk(ranks)[rank] for half in own.chunk(2)])
                elif isinstance(how[name], int):
                    own = own.chunk(ranks, how[name])[rank]
                if own.dim() > 1 and rng.random() < 0.3:  # a rank's slice may lie in any order
                    own = own.transpose(0, 1).contiguous().transpose(0, 1)
                part[name] = own.clone() if rng.random() < 0.5 else own
        folder = write_parts(tmp_path / str(seed), parts)
        path = tmp_path / "rules.json"
        path.write_text(json.dumps(how))
        require_same(ckptkit.load_state_dict(folder, tp_rules=path), state)


# The option.


def test_every_command_takes_rules(tmp_path: Path, run: Run) -> None:
    given = rules(tmp_path / "rules.json", **{"*": 0})
    folder = write_parts(tmp_path / "a", [{"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 3)}])
    out, full = tmp_path / "out.safetensors", torch.cat([torch.zeros(2, 3), torch.ones(2, 3)])
    manifest = tmp_path / "weights.json"

    def command(*words: object, code: int = 0) -> str:
        done = run(*words, "--tp-rules", given)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    document = json.loads(command("inspect", folder, "--json"))["files"][0]
    assert (document["format"], document["tensors"][0]["shape"]) == ("megatron", [4, 3])
    command("convert", folder, out)
    require_same(ckptkit.load_state_dict(out), {"w": full})
    command("diff", folder, out)
    save_file({"w": torch.zeros(4, 3)}, tmp_path / "other.safetensors")
    command("diff", tmp_path / "other.safetensors", folder, code=1)
    command("check", folder, "--no-nan")
    command("manifest", folder, "-o", manifest)
    command("check", folder, "--manifest", manifest)
    torch.save({"w": torch.full((2, 3), 2.0)}, folder / "part-1.pt")
    command("check", folder, "--manifest", manifest, code=1)
    assert ckptkit.inspect(folder, tp_rules=given)["tensors"][0]["shape"] == [4, 3]


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("", CkptkitError, "JSON"),
        ("[]", CorruptError, "a rules file is a JSON object"),
        ("{}", CorruptError, "a rules file is a JSON object"),
        ('{"*.w": "row"}', CorruptError, 'the rule for .*w.* is .*row.*; expected a dimension'),
        ('{"*.w": -1}', CorruptError, "expected a dimension"),
        ('{"*.w": true}', CorruptError, "expected a dimension"),
        ('{"*.w": 1.0}', CorruptError, "expected a dimension"),
        ('{"a": 0, "a": 1}', CkptkitError, "twice"),
    ],
)  # fmt: skip
def test_rules_that_are_none_are_refused(tmp_path: Path, text: str, error: type[CkptkitError], told: str) -> None:
    path = tmp_path / "rules.json"
    path.write_text(text)
    folder = write_parts(tmp_path / "a", [{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    with pytest.raises(error, match=told) as caught:
        ckptkit.open(folder, tp_rules=path)
    assert str(path) in str(caught.value)


def test_rules_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    given = rules(tmp_path / "rules.json", **{"*": 1})
    folder = write_parts(tmp_path / "a", [{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    with pytest.raises(CorruptError, match=r"the slice \[2\] in part-0.pt does not fit the first one"):
        ckptkit.open(folder, tp_rules=given)
    with pytest.raises(FileAccessError, match="joins the files of several ranks in a folder"):
        ckptkit.open(folder / "part-0.pt", tp_rules=given)
    (folder / "part-1.pt").unlink()
    with pytest.raises(CkptkitError, match="--tp-rules joins files whose names differ"):
        ckptkit.open(folder, tp_rules=given)
    with pytest.raises(FileAccessError):
        ckptkit.open(folder, tp_rules=tmp_path / "nothing.json")


def test_a_slice_of_llama_alone_is_a_part(tmp_path: Path) -> None:
    write_llama(tmp_path / "a", 2, version=2)
    (tmp_path / "a" / "consolidated.01.pth").unlink()
    for given in (tmp_path / "a", tmp_path / "a" / "consolidated.00.pth"):
        with pytest.raises(PartError, match="of a Llama checkpoint in tensor-parallel parts, not the whole"):
            ckptkit.load_state_dict(given)
