"""Adapters, textual inversions and quantized weights, under the names that those who write them give."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.normalize.quantized import scaled_pairs

Tensors = dict[str, torch.Tensor]


def lora(names: str, rank: int = 8, sides: str = "A B", wide: int = 64, **dtype: Any) -> Tensors:
    """The two projections of modules; ``names`` has a place for the layer and one for the side."""
    down, up = sides.split()
    shapes = {down: (rank, wide), up: (48, rank)}
    return {names.format(i, side): torch.zeros(shapes[side], **dtype) for i in range(2) for side in (down, up)}


PEFT = lora("base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight")
KOHYA = {
    **lora("lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight", 16, "down up", 768),
    "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.zeros(16, 32, 3, 3),
    "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.zeros(32, 16, 1, 1),
    "lora_unet_mid_block_resnets_0_conv1.alpha": torch.tensor(8.0),
    **{
        f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn2_to_k.alpha": torch.tensor(8).bfloat16()
        for i in range(2)
    },
}
LOHA = {
    "lycoris_blocks_0_ff_net_2.hada_w1_a": torch.zeros(64, 4),
    "lycoris_blocks_0_ff_net_2.hada_w1_b": torch.zeros(4, 32),
    "lycoris_blocks_0_ff_net_2.hada_w2_a": torch.zeros(64, 4),
    "lycoris_blocks_0_ff_net_2.hada_w2_b": torch.zeros(4, 32),
    "lycoris_conv.hada_t1": torch.zeros(4, 4, 3, 3),  # with a core both factors begin with the rank
    "lycoris_conv.hada_w1_a": torch.zeros(4, 64),
    "lycoris_conv.hada_w1_b": torch.zeros(4, 32),
}
LOKR = {
    "diffusion_model.a.lokr_w1": torch.zeros(4, 4),
    "diffusion_model.a.lokr_w2_a": torch.zeros(16, 8),
    "diffusion_model.a.lokr_w2_b": torch.zeros(8, 16),
    "diffusion_model.a.alpha": torch.tensor(1e10),
}
DORA = {**PEFT, **{name.replace("A.weight", "magnitude_vector"): torch.zeros(48) for name in PEFT if "_A" in name}}


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Any]:
    def described(tensors: Tensors, metadata: dict[str, str] | None = None) -> Any:
        save_file(tensors, tmp_path / "adapter_model.safetensors", metadata)
        return ckptkit.inspect(tmp_path / "adapter_model.safetensors")["adapter"]

    return described


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (PEFT, {"kind": "lora", "layout": "peft", "rank": 8, "targets": {"q_proj": 2}, "modules": 2, "base": None}),
        (lora("base_model.model.h.{}.c_attn.lora_{}.default.weight"), {"kind": "lora", "rank": 8, "layout": "peft"}),
        (DORA, {"kind": "dora", "rank": 8, "modules": 2, "others": 0}),
        (KOHYA, {"kind": "lora", "layout": "kohya", "rank": 16, "alpha": 8, "modules": 3, "others": 0,
                 "targets": {"attn2_to_k": 2, "conv1": 1}, "base": "Stable Diffusion 1", "told_by": "names"}),
        (lora("unet.blocks.{}.attn1.to_out.0.lora.{}.weight", 4, "down up"),
         {"layout": "diffusers", "rank": 4, "targets": {"to_out.0": 2}}),
        (lora("unet.blocks.{}.attn1.processor.to_q_lora.{}.weight", 4, "down up"), {"rank": 4, "targets": {"to_q": 2}}),
        (lora("text_encoder.layers.{}.q_proj.lora_linear_layer.{}.weight", 4, "down up"), {"targets": {"q_proj": 2}}),
        (lora("double_blocks.{}.processor.qkv_lora1.{}.weight", 4, "down up"), {"rank": 4, "told_by": "names"}),
        (lora("transformer.single_transformer_blocks.{}.attn.to_q.lora_{}.weight", 32),
         {"layout": "diffusers", "rank": 32, "base": "FLUX.1 or a related model"}),
        (LOHA, {"kind": "loha", "rank": 4, "modules": 2}),
        (LOKR, {"kind": "lokr", "rank": 8, "alpha": 1e10, "layout": "diffusers"}),
        ({"m.a.ia3_l": torch.zeros(4, 1)}, {"kind": "ia3", "rank": None, "targets": {"a": 1}}),
        ({**PEFT, **LOKR}, {"kind": "mixed", "rank": 8, "layout": None}),
        ({**lora("x.{}.lora_{}", 4), **lora("y.{}.lora_{}", 16)}, {"rank": "mixed", "ranks": [4, 16]}),
        ({"x.lora_A": torch.zeros(4, 9), "x.lora_B": torch.zeros(9, 8)}, {"rank": "mixed", "ranks": [4, 8]}),
        ({**PEFT, **{f"w.{i}.weight": torch.zeros(3) for i in range(99)}}, {"rank": 8, "others": 99, "layout": "peft"}),
        ({"<cat-toy>": torch.zeros(768)}, {"kind": "textual_inversion", "targets": {"<cat-toy>": 1}, "modules": 1,
                                           "base": "Stable Diffusion 1", "rank": None}),
        ({"emb_params": torch.zeros(4, 1024)}, {"targets": {"emb_params": 4}, "base": "Stable Diffusion 2"}),
        ({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
         {"kind": "textual_inversion", "targets": {"clip_g": 2, "clip_l": 2}, "base": "Stable Diffusion XL"}),
    ],
)  # fmt: skip
def test_adapters_are_told_by_names_and_shapes(adapter: Any, tensors: Tensors, expected: dict[str, Any]) -> None:
    found = adapter(tensors)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"ss_network_dim": "16", "ss_network_alpha": "8", "ss_base_model_version": "sd_v1"}, (16, 8, "sd_v1")),
        ({"ss_network_dim": "32"}, ("mixed", 8, "Stable Diffusion 1")),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, (16, 8, "stable-diffusion-v1")),
        ({"ss_network_dim": "NaN", "ss_base_model_version": ""}, (16, 8, "Stable Diffusion 1")),
    ],
)
def test_what_the_metadata_says(adapter: Any, metadata: dict[str, str], expected: tuple[Any, ...]) -> None:
    found = adapter(KOHYA, metadata)
    assert (found["rank"], found["alpha"], found["base"]) == expected


def test_alphas_of_diffusers_metadata(adapter: Any) -> None:
    config = json.dumps({"transformer.r": 8, "transformer.lora_alpha": 4.5, "text_encoder.lora_alpha": 4.5})
    assert adapter(PEFT, {"lora_adapter_metadata": config})["alpha"] == 4.5
    assert adapter({**KOHYA, "lora_unet_mid_block_resnets_0_conv1.alpha": torch.tensor(1.0)})["alpha"] == "mixed"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16},
         {"rank": 8, "alpha": 16, "base": "org/base", "told_by": "adapter_config.json"}),
        ({"r": 4, "lora_alpha": 16}, {"rank": "mixed", "ranks": [4, 8], "base": None}),
        ({"r": 4, "rank_pattern": {"q_proj": 8}, "lora_alpha": 1, "alpha_pattern": {"q_proj": 2}},
         {"rank": 8, "alpha": "mixed"}),
        ({"r": True, "lora_alpha": [1], "base_model_name_or_path": 3}, {"rank": 8, "alpha": None, "base": None}),
        ([1, 2], {"rank": 8, "alpha": None}),
    ],
)  # fmt: skip
def test_the_configuration_beside(adapter: Any, tmp_path: Path, config: Any, expected: dict[str, Any]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = adapter(PEFT)
    assert {key: found[key] for key in expected} == expected


def test_a_configuration_that_is_none_is_passed_over(adapter: Any, tmp_path: Path) -> None:
    plain = adapter(PEFT)
    for text in ("{", "[" * 100_000, '{"r": 8' + " " * (2 << 20), '{"lora_alpha": 1e999}', "\0"):
        (tmp_path / "adapter_config.json").write_text(text)
        assert adapter(PEFT) == plain
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    assert adapter(PEFT) == plain


def test_a_textual_inversion_of_the_web_interface(save: Callable[..., Path]) -> None:
    saved = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(8, 768)}, "name": "cat", "step": 5}
    found = ckptkit.inspect(save(saved))["adapter"]
    assert found is not None
    assert (found["targets"], found["base"], found["told_by"]) == ({"*": 8}, "Stable Diffusion 1", "names")
    named = ckptkit.inspect(save({**saved, "sd_checkpoint_name": "v1-5-pruned"}))["adapter"]
    assert named is not None and (named["base"], named["told_by"]) == ("v1-5-pruned", "metadata")


def test_many_kinds_of_modules_are_listed_in_part(adapter: Any) -> None:
    tensors = {f"m{i}.lora_{side}": torch.zeros(i + 1, i + 1) for i in range(70) for side in "AB"}
    found = adapter(tensors)
    assert (found["modules"], found["rank"], len(found["ranks"]), len(found["targets"])) == (70, "mixed", 50, 50)


# Quantized weights.

PLAIN = {"model.embed_tokens.weight": torch.zeros(9, 4).half(), "model.norm.weight": torch.zeros(4).half()}


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def packed(bits: int, group: int, wide: int = 512, out: int = 256) -> Tensors:
    """What GPTQ and AWQ have in common."""
    groups = wide // group
    return {"qzeros": ints(groups, out * bits // 32), "scales": torch.zeros(groups, out).half()}


def gptq(bits: int, group: int, wide: int = 512, out: int = 256) -> Tensors:
    return {"qweight": ints(wide * bits // 32, out), "g_idx": ints(wide), **packed(bits, group, wide, out)}


def awq(bits: int = 4, group: int = 128) -> Tensors:
    return {"qweight": ints(512, 256 * bits // 32), **packed(bits, group)}


def nf4(numel: int = 64 * 256, nested: bool = False) -> Tensors:
    tensors = {
        "weight": torch.zeros(numel // 2, 1).byte(),
        "weight.absmax": torch.zeros(numel // 64),
        "weight.quant_map": torch.zeros(16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(90).byte(),
    }
    if nested:
        tensors |= {"weight.absmax": torch.zeros(numel // 64).byte(), "weight.nested_absmax": torch.zeros(1)}
        tensors |= {"weight.nested_quant_map": torch.zeros(256)}
    return tensors


def fp8(*scale: int, name: str = "weight_scale", shape: tuple[int, ...] = (300, 260)) -> Tensors:
    return {"weight": torch.zeros(shape).to(torch.float8_e4m3fn), name: torch.zeros(scale)}


def byte(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


COMPRESSED = {
    "weight_packed": ints(64, 16),
    "weight_scale": torch.zeros(64, 4),
    "weight_shape": torch.tensor([64, 128]),
}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (gptq(4, 128), {"method": "gptq", "bits": 4, "dtype": "int4", "strategy": "group", "group_size": 128,
                        "companions": ["qweight", "g_idx", "qzeros", "scales"]}),
        (gptq(3, 128), {"method": "gptq", "bits": 3, "group_size": 128}),
        (gptq(8, 512), {"method": "gptq", "bits": 8, "group_size": None, "strategy": "channel"}),
        ({**gptq(4, 128), "g_idx": ints(256)}, {"method": "gptq", "bits": "mixed"}),
        ({name: value for name, value in gptq(4, 32).items() if name != "qzeros"}, {"bits": 4, "group_size": 32}),
        ({"qweight": ints(256, 512), "qzeros": ints(256, 4), "scales": torch.zeros(256, 32).half()},  # of its GEMV
         {"method": "awq", "bits": 4, "group_size": 128}),
        (awq(), {"method": "awq", "bits": 4, "group_size": 128, "companions": ["qweight", "qzeros", "scales"]}),
        (nf4(), {"method": "bitsandbytes", "dtype": "nf4", "bits": 4, "group_size": 64}),
        (nf4(nested=True), {"method": "bitsandbytes", "dtype": "nf4", "group_size": 64}),
        ({**nf4(), "weight": torch.zeros(64 * 64, 1).bfloat16()}, {"method": "bitsandbytes", "group_size": 64}),
        ({"weight": torch.zeros(8, 8).char(), "SCB": torch.zeros(8), "weight_format": torch.tensor(0).byte()},
         {"method": "bitsandbytes", "dtype": "int8", "bits": 8, "companions": ["weight", "SCB", "weight_format"]}),
        (fp8(3, 3, name="weight_scale_inv"), {"method": "fp8", "bits": 8, "strategy": "block"}),
        (fp8(), {"method": "fp8", "dtype": "float8_e4m3fn", "strategy": "tensor"}),
        (fp8(300, 1), {"method": "fp8", "strategy": "channel"}),
        (fp8(name="scale_weight"), {"method": "fp8", "companions": ["weight", "scale_weight"]}),
        (COMPRESSED, {"method": "compressed-tensors", "bits": 4, "group_size": 32,
                      "companions": ["weight_packed", "weight_scale", "weight_shape"]}),
        ({**COMPRESSED, "weight_shape": torch.tensor([64, 64])}, {"bits": 8, "group_size": 16}),
        ({"weight_packed": byte(64, 64), "weight_scale": torch.zeros(64, 8).to(torch.float8_e4m3fn),
          "weight_global_scale": torch.zeros(1), "input_global_scale": torch.zeros(1)},
         {"method": "nvfp4", "bits": 4, "group_size": 16}),
        ({"experts_blocks": byte(4, 64, 2, 16), "experts_scales": byte(4, 64, 2)},
         {"method": "mxfp4", "bits": 4, "group_size": 32, "companions": ["*_blocks", "*_scales"]}),
        ({"W_q": byte(32, 32), "scale": torch.zeros(32, 1), "zero": torch.zeros(32, 1), "nbits": torch.tensor(2),
          "group_size": torch.tensor(64)}, {"method": "hqq", "bits": 2, "group_size": 64}),
        ({"codes": torch.zeros(4, 8, 1).char(), "codebooks": torch.zeros(1, 256, 1, 8), "scales": torch.zeros(4)},
         {"method": "aqlm", "bits": None, "companions": ["codes", "codebooks", "scales"]}),
        ({"weight": torch.zeros(8, 9).char(), "weight_scale": torch.zeros(8, 1)}, {"method": "int8", "bits": 8}),
        ({"weight": byte(8, 9), "scale": torch.zeros(7, 7)}, {"method": "other", "bits": None}),
    ],
)  # fmt: skip
def test_quantized_weights_are_told_by_names_and_shapes(
    tmp_path: Path, tensors: Tensors, expected: dict[str, Any]
) -> None:
    layers = {f"model.layers.{i}.{m}.{name}": t.clone() for i in range(2) for m in "qk" for name, t in tensors.items()}
    save_file({**layers, **PLAIN}, tmp_path / "model.safetensors")
    found = ckptkit.inspect(tmp_path / "model.safetensors")["quantization"]
    assert found is not None
    assert {key: found[key] for key in expected} == expected  # type: ignore[literal-required]
    assert (found["modules"], found["plain"], len(found["layouts"])) == (4, 1, 1)
    assert found["layouts"][0]["example"] == "model.layers.0.k" + ".experts" * ("experts_blocks" in tensors)


def test_blocks_have_one_size_however_small_or_ragged_the_weight_is(tmp_path: Path) -> None:
    shapes = [(300, 260, 3, 3), (64, 7168, 1, 56), (64, 64, 1, 1), (1536, 128, 12, 1), (576, 512, 5, 4)]
    layers = {
        f"{i}.{name}": tensor
        for i, (*shape, tall, wide) in enumerate(shapes)
        for name, tensor in fp8(tall, wide, name="weight_scale_inv", shape=(*shape,)).items()
    }
    save_file(layers, tmp_path / "model.safetensors")
    found = ckptkit.inspect(tmp_path / "model.safetensors")["quantization"]
    assert found is not None
    assert [(layout["strategy"], layout["block"], layout["modules"]) for layout in found["layouts"]] == [
        ("block", [128, 128], 5)
    ]


def test_weights_beside_one_another_have_their_own_scales(tmp_path: Path) -> None:
    flat = {f"{p}_{name}": t for p in ("gate", "up") for name, t in fp8(300, 1).items()}
    experts = {
        f"experts.{p}_{n}": byte(*s) for p in "ab" for n, s in (("blocks", (4, 8, 2, 16)), ("scales", (4, 8, 2)))
    }
    for tensors, companions in ((flat, ["*", "*_scale"]), (experts, ["*_blocks", "*_scales"])):
        save_file(tensors, tmp_path / "model.safetensors")
        found = ckptkit.inspect(tmp_path / "model.safetensors")["quantization"]
        assert found is not None
        assert [(layout["companions"], layout["modules"]) for layout in found["layouts"]] == [(companions, 2)]


def test_a_hostile_file_costs_no_more_time_than_another(tmp_path: Path) -> None:
    number, byte = numpy.zeros(1, "float32"), numpy.zeros(1, "int8")
    files = [
        {f"w{i}{end}": byte for i in range(10_000) for end in ("", "_scale")},  # all beside all
        {"lora_A." + "linear" * 100_000 + "_lora" * 9: number, "_1_1" * 100_000 + ".lora_A": number},
        {"w": byte, "_scale" * 50_000: number, "q_" * 50_000: byte},
    ]
    for arrays in files:
        safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
        start = time.process_time()
        ckptkit.inspect(tmp_path / "model.safetensors")
        assert time.process_time() - start < 20  # seconds; pairs of all with all, or regexes that go back, are hours


def test_layouts_that_differ_are_mixed(tmp_path: Path) -> None:
    layers = {f"{i}.{name}": tensor for i in range(3) for name, tensor in gptq(4, 128).items()}
    layers |= {f"head.{name}": tensor for name, tensor in gptq(8, 128).items()}
    save_file(layers, tmp_path / "model.safetensors")
    found = ckptkit.inspect(tmp_path / "model.safetensors")["quantization"]
    assert found is not None
    assert (found["method"], found["bits"], found["group_size"], found["modules"]) == ("gptq", "mixed", 128, 4)
    assert [(layout["bits"], layout["modules"]) for layout in found["layouts"]] == [(4, 3), (8, 1)]


def test_quantized_modules_of_torch(save: Callable[..., Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)), dtype=torch.qint8)
    found = ckptkit.inspect(save(net.state_dict()))["quantization"]
    assert found is not None
    assert (found["method"], found["dtype"], found["bits"], found["modules"]) == ("torch", "qint8", 8, 1)


def test_what_is_neither(save: Callable[..., Path]) -> None:
    plain = {
        "floral.weight": torch.ones(2, 2),
        "logit_scale": torch.ones(()),
        "attn.bias": torch.ones(1, 1, 4, 4).byte(),
        "attn.scale": torch.ones(4),
        "position_ids": torch.arange(4),
        "embed.weight_scale": torch.ones(3),
    }
    for saved in (plain, {**plain, "lora_name.weight": torch.ones(2)}, {"model": plain, "epoch": 3}, [torch.ones(2)]):
        found = ckptkit.inspect(save(saved))
        assert (found["adapter"], found["quantization"]) == (None, None)


def test_it_is_said_in_text_and_in_markdown(tmp_path: Path, command: Any) -> None:
    save_file(PEFT, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a\x1bb", "lora_alpha": 16}))
    text = command("inspect", tmp_path / "adapter_model.safetensors").out
    assert "adapter: LoRA (peft's names), rank 8, alpha 16, on 2 modules: q_proj (2); for a\\x1bb, says" in text
    assert "**adapter**: LoRA" in command("inspect", "--format", "markdown", tmp_path / "adapter_model.safetensors").out
    save_file({f"{i}.{k}": t for i in range(2) for k, t in awq().items()} | PLAIN, tmp_path / "q.safetensors")
    text = command("inspect", tmp_path / "q.safetensors").out
    assert "quantized: AWQ, 4 bits, groups of 128 (2 modules of qweight, qzeros, scales); 1 other module with" in text
    assert "the weights of 2 modules are quantized" in text
    assert "bits" in command("explain", "quantized-weights").out


def test_scales_pair_as_they_do_for_casts(tmp_path: Path) -> None:
    save_file({f"a.{name}": tensor for name, tensor in gptq(4, 128).items()}, tmp_path / "model.safetensors")
    with ckptkit.open(tmp_path / "model.safetensors") as file:
        assert scaled_pairs(file.state_dict) == {"a.scales": "a.qweight", "a.qweight": "a.scales"}
