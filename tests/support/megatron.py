"""Checkpoints of Megatron's ranks, cut from a whole model by torch: what Megatron itself writes, without Megatron."""

from __future__ import annotations

import argparse
import io
import itertools
import pickle
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A model and over how many ranks it is split."""

    layers: int = 4
    hidden: int = 8
    ffn: int = 12
    vocab: int = 16
    experts: int = 0
    swiglu: bool = True
    tied: bool = False
    tp: int = 1
    pp: int = 1
    ep: int = 1
    virtual: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    def args(self) -> argparse.Namespace:
        return argparse.Namespace(
            num_layers=self.layers, hidden_size=self.hidden, swiglu=self.swiglu, params_dtype=torch.bfloat16,
            tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp,
            expert_model_parallel_size=self.ep, untie_embeddings_and_output_weights=not self.tied,
            padded_vocab_size=self.vocab, vocab_size=self.vocab - 3, rank=0, seed=1234, **self.extra,
        )  # fmt: skip


def whole(shape: Shape) -> State:
    """The state_dict of one process (names of megatron-core)."""
    generator = torch.Generator().manual_seed(shape.layers * 100 + shape.hidden)

    def made(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(shape.dtype)

    hidden, ffn = shape.hidden, shape.ffn
    state = {"embedding.word_embeddings.weight": made(shape.vocab, hidden)}
    for layer in range(shape.layers):
        at = f"decoder.layers.{layer}."
        state[at + "self_attention.linear_proj.weight"] = made(hidden, hidden)
        state[at + "self_attention.linear_proj.bias"] = made(hidden)
        state[at + "self_attention.linear_qkv.layer_norm_weight"] = made(hidden)
        state[at + "self_attention.linear_qkv.weight"] = made(3 * hidden, hidden)
        state[at + "self_attention.linear_qkv.bias"] = made(3 * hidden)
        inner = [f"{at}mlp."]
        if shape.experts:
            state[at + "mlp.router.weight"] = made(shape.experts, hidden)
            inner = [f"{at}mlp.experts.local_experts.{number}." for number in range(shape.experts)]
        for before in inner:
            state[before + "linear_fc1.weight"] = made(ffn * (2 if shape.swiglu else 1), hidden)
            state[before + "linear_fc1.bias"] = made(ffn * (2 if shape.swiglu else 1))
            state[before + "linear_fc2.weight"] = made(hidden, ffn)
    state["decoder.final_layernorm.weight"] = made(hidden)
    if not shape.tied:
        state["output_layer.weight"] = made(shape.vocab, hidden)
    return state


def cut(name: str, tensor: torch.Tensor, shape: Shape, rank: int) -> torch.Tensor:
    """The slice of a tensor-parallel rank."""
    if "linear_fc1" in name and "norm" not in name and shape.swiglu:
        return torch.cat([half.chunk(shape.tp)[rank] for half in tensor.chunk(2)])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(shape.tp, 1)[rank]
    whole = ("norm.weight", "norm_weight", "proj.bias", "fc2.bias", "router.weight")
    return tensor if name.endswith(whole) else tensor.chunk(shape.tp)[rank]


def chunk_of(state: State, shape: Shape, rank: int, stage: int, expert: int, number: int) -> State:
    """What a rank has of a model: of one chunk of its stage, as it names it."""
    count = shape.layers // (shape.pp * shape.virtual)
    begin = (number * shape.pp + stage) * count
    own: State = {}
    for name, tensor in state.items():
        head, *rest = name.split("layers.")
        if rest:
            layer, _, tail = rest[0].partition(".")
            if not begin <= int(layer) < begin + count:
                continue
            if "local_experts." in tail:
                before, _, after = tail.partition("local_experts.")
                which, _, last = after.partition(".")
                each = shape.experts // shape.ep
                if int(which) // each != expert:
                    continue
                tail = f"{before}local_experts.{int(which) % each}.{last}"
            name = f"{head}layers.{int(layer) - begin}.{tail}"
        elif name.startswith("embedding"):
            if (stage, number) != (0, 0):
                continue
        elif (stage, number) != (shape.pp - 1, shape.virtual - 1):
            continue
        own[name] = cut(name, tensor, shape, rank).clone()
    if shape.tied and shape.pp > 1 and (stage, number) == (shape.pp - 1, shape.virtual - 1):
        own["output_layer.weight"] = cut("output", state["embedding.word_embeddings.weight"], shape, rank).clone()
    return own


OLD = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


def old_name(name: str) -> str:
    """A name as it was before megatron-core."""
    for new, old in OLD.items():
        name = name.replace(new, old)
    return f"language_model.{name}".replace("decoder.", "encoder.")


def nested(state: State, *, tied: bool = False) -> dict[str, Any]:
    """Dicts inside dicts, as ``megatron/legacy/model/language_model.py`` saves them."""
    tree: dict[str, Any] = {}
    for name, value in state.items():
        if tied and name == "output_layer.weight":
            tree["word_embeddings_for_head"] = OrderedDict(weight=value)
            continue
        path = old_name(name).split(".")
        keys = path[:2] if path[1] == "encoder" else path[:-1]
        inner = tree
        for key in keys:
            inner = inner.setdefault(key, OrderedDict())
        inner[".".join(path[len(keys) :])] = value
    return tree


def write_ranks(
    folder: Path, shape: Shape, state: State, *, old: bool = False, version: float | None = 3.0, **more: Any
) -> Path:
    """``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``."""
    for rank in range(shape.tp):
        for stage in range(shape.pp):
            for expert in range(shape.ep):
                name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if shape.pp > 1 else "")
                name += f"_{expert:03}" if shape.ep > 1 else ""
                args = shape.args()
                args.rank = (stage * shape.ep + expert) * shape.tp + rank
                saved: dict[str, Any] = {"args": args, "iteration": 10, **more}
                if version is not None:
                    saved["checkpoint_version"] = version
                for number in range(shape.virtual):
                    own = chunk_of(state, shape, rank, stage, expert, number)
                    key = "model" if shape.virtual == 1 else f"model{number}"
                    saved[key] = nested(own, tied=shape.tied) if old else OrderedDict(own)
                saved["opt_param_scheduler"] = {"max_lr": 0.1}
                saved["rng_state"] = [{"torch_rng_state": torch.arange(9, dtype=torch.uint8) + args.rank}]
                (folder / name).mkdir(parents=True)
                torch.save(saved, folder / name / "model_optim_rng.pt")
    return folder


def write_llama(folder: Path, ranks: int, *, version: int = 3, dim: int = 8, vocab: int = 12) -> State:
    """``consolidated.NN.pth`` and ``params.json``; the whole state_dict."""
    folder.mkdir(parents=True, exist_ok=True)
    state: State = {"tok_embeddings.weight": torch.randn(vocab, dim)}
    axes: dict[str, int | None] = {"tok_embeddings.weight": 0 if version == 3 else 1}
    for layer in range(2):
        at = f"layers.{layer}."
        for name, size, axis in (
            ("attention.wq", (dim, dim), 0), ("attention.wk", (dim // 2, dim), 0), ("attention.wv", (dim // 2, dim), 0),
            ("attention.wo", (dim, dim), 1), ("feed_forward.w1", (3 * dim, dim), 0),
            ("feed_forward.w2", (dim, 3 * dim), 1), ("feed_forward.w3", (3 * dim, dim), 0),
            ("attention_norm", (dim,), None), ("ffn_norm", (dim,), None),
        ):  # fmt: skip
            state[f"{at}{name}.weight"], axes[f"{at}{name}.weight"] = torch.randn(*size), axis
    state["norm.weight"], axes["norm.weight"] = torch.randn(dim), None
    state["output.weight"], axes["output.weight"] = torch.randn(vocab, dim), 0
    state["rope.freqs"], axes["rope.freqs"] = torch.rand(4), None
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    for rank in range(ranks):
        own = {
            name: tensor.clone() if axes[name] is None else tensor.chunk(ranks, axes[name] or 0)[rank].clone()
            for name, tensor in state.items()
        }
        torch.save(own, folder / f"consolidated.{rank:02}.pth")
    said = f'{{"dim": {dim}, "n_layers": 2, "n_heads": 4, "vocab_size": {vocab if version == 3 else -1}}}'
    (folder / "params.json").write_text(said)
    return state


# torch_dist.


def boxes(size: Sequence[int], rng: random.Random) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that make up a tensor of a size, cut anywhere."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for length in size:
        cuts = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randrange(3)))})
        found = [
            ((*at, a), (*sizes, b - a)) for at, sizes in found for a, b in itertools.pairwise(cuts)
        ]  # fmt: skip
    return found


def write_dist(
    folder: Path, tensors: State, objects: dict[str, object], common: dict[str, Any] | None, *, seed: int = 0
) -> Path:
    """A folder of torch.distributed.checkpoint as Megatron lays it out, each tensor in boxes over two files."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    files = {f"__{rank}_0.distcp": io.BytesIO() for rank in range(2)}
    stored: dict[Any, Any] = {}
    described: dict[str, Any] = {}

    def item(index: MetadataIndex, value: object) -> None:
        name = rng.choice(list(files))
        data = io.BytesIO()
        torch.save(value, data)
        stored[index] = _StorageInfo(name, files[name].tell(), len(data.getvalue()))
        files[name].write(data.getvalue())

    for name, tensor in tensors.items():
        chunks = boxes(tensor.shape, rng)
        described[name] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), tensor.size(),
            [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in chunks],
        )  # fmt: skip
        for at, sizes in chunks:
            own = tensor[tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))].clone()
            item(MetadataIndex(name, torch.Size(at)), own)
    for name, value in objects.items():
        described[name] = BytesStorageMetadata()
        item(MetadataIndex(name), [value])
    for name, data in files.items():
        (folder / name).write_bytes(data.getvalue())
    metadata = Metadata(described, None, stored)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))
    backend = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}'
    (folder / "metadata.json").write_text(backend)
    if common is not None:
        torch.save(common, folder / "common.pt")
    return folder


def stacked(state: State) -> State:
    """The layers of a model, and its experts, as one tensor each."""
    groups: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for name, tensor in state.items():
        words, place, own = name.split("."), [], []
        for number, word in enumerate(words):
            if word.isdigit() and words[number - 1] in ("layers", "local_experts"):
                place.append(int(word))
                if words[number - 1] == "local_experts":
                    own[-1] = "experts"
            else:
                own.append(word)
        groups.setdefault(".".join(own), {})[tuple(place)] = tensor
    found: State = {}
    for name, each in groups.items():
        sizes = [max(place) + 1 for place in zip(*each, strict=True)] if () not in each else []
        tensors = torch.stack([each[place] for place in sorted(each)]) if sizes else each[()]
        found[name] = tensors.reshape(*sizes, *tensors.shape[1:]) if sizes else tensors
    return found


def flat_slices(tensor: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The slices of a tensor along each dimension, each flat: ``grid`` and the elements of one."""
    sizes = [size // count for size, count in zip(tensor.shape, grid, strict=True)]
    split = tensor.reshape([part for pair in zip(grid, sizes, strict=True) for part in pair])
    dims = range(0, 2 * len(sizes), 2)
    return split.permute([*dims, *(dim + 1 for dim in dims)]).reshape(*grid, -1).contiguous()
