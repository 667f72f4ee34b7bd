"""Adapters and textual inversions: small files that belong to a larger model, identified by the names of their tensors.

Whose names they are:

- peft: ``base_model.model.….q_proj.lora_A.weight``, ``lora_A.default.weight``, ``lora_embedding_A``,
  ``lora_magnitude_vector`` (DoRA), ``ia3_l``, ``oft_R``, ``vera_lambda_b``; ``adapter_config.json`` is beside
- sd-scripts of kohya: ``lora_unet_….lora_down.weight``, ``.alpha``; ``ss_network_dim`` and the like in the metadata
- diffusers: ``unet.….to_q.lora.down.weight``, ``processor.to_q_lora.up.weight``, ``lora_linear_layer``; AI-toolkit and
  Black Forest Labs: ``transformer.….lora_A.weight``, ``diffusion_model.``; XLabs: ``qkv_lora1.down.weight``
- LyCORIS: ``hada_w1_a`` (LoHa), ``lokr_w1`` (LoKr), ``oft_blocks``, ``dora_scale``; loralib: only ``lora_A``
- textual inversions: ``string_to_param`` and ``emb_params`` (AUTOMATIC1111), ``<token>`` (diffusers), ``clip_l`` and
  ``clip_g`` (of Stable Diffusion XL)

A down projection is [rank, in, …], an up projection [out, rank, …]: both show the rank.  Numbers that are recorded, the
alpha among them, are read; no other value is.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, TypedDict

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import Checkpoint, TensorEntry
from ckptkit.computed import can_be_looked_at
from ckptkit.errors import CkptkitError
from ckptkit.normalize.selection import EMBEDDINGS
from ckptkit.pickling.inert import mapping_items
from ckptkit.report import count_of, listed, printable
from ckptkit.startup import pattern

__all__ = [
    "SMALL_FORMATS",
    "AdapterDocument",
    "adapter_in",
    "adapter_text",
    "customs",
    "is_adapter",
    "is_embedding",
    "small_values",
]

_SAMPLED = 32
"""Names that distinguish a state_dict from other mappings of names to tensors."""

_PART = pattern(
    r"(?:^|[._])(?:"
    r"lora(?:_linear_layer|[0-9]+)?[._](?P<lora>A|B|up|down|mid|embedding_[AB]|magnitude_vector)|"
    r"(?P<kin>hada|lokr)_(?P<factor>[wt][12](?:_[ab])?)|"
    r"(?P<other>ia3_l|b?oft_(?:R|r|s|blocks|diag)|vera_lambda_[bd]|dora_scale)|"
    r"(?:linear|processor)[\w.]{0,99}_lora(?![._](?:down|up)))(?:[._]|$)"
)
"""The part of a name that is an adapter's; what is before it is the module."""

_KINDS = {"hada": "loha", "lokr": "lokr", "ia3": "ia3", "oft": "oft", "boft": "boft", "vera": "vera", "dora": "dora"}

_EMBEDDING = pattern(r"<[^<>]+>|emb_params|clip_[lg]|t5xxl")

_SCRIPTS = pattern(r"(?:lora_(?:unet|te[0-9]?|transformer|prior_unet)|lycoris(?:_unet)?)_")
"""How names begin that have no dots in their modules."""

_PIPELINES = ("unet.", "text_encoder", "transformer.", "diffusion_model.")
"""How names in adapters of diffusion pipelines begin."""

_CONFIG = "adapter_config.json"

_DOWN, _UP = ("A", "down", "embedding_A"), ("B", "up", "embedding_B")
"""The projections of a LoRA: [rank, in, …] and [out, rank, …]."""

_MAX_TEXT = 200
"""Characters of what is recorded as the base."""

_CONFIG_NBYTES = 1 << 20
"""More than any such file has."""

_MAX_TARGETS = 50
"""Kinds of modules, and ranks, that are listed."""

_MAX_READ = 10_000
"""Alphas that are read; the largest adapters have some thousand modules."""

_BASE_KEYS = (
    "base_model_name_or_path",
    "ss_base_model_version",
    "modelspec.architecture",
    "ss_sd_model_name",
    "base_model",
)
"""In the metadata, the most telling first."""

_BASES = (
    (pattern(r"(?:^|[._])(?:double_blocks|single_transformer_blocks)[._]"), "FLUX.1 or a related model"),
    (pattern(r"(?:^|[._])joint_(?:transformer_)?blocks[._]"), "Stable Diffusion 3 or a related model"),
)
"""Models that have modules of these names."""

_UNET = ("down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block")

_CROSS_ATTENTION = pattern(r"(?:^|[._])attn2[._](?:processor\.)?to_[kv]$")

_CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""By the width of the text that a UNet attends to."""

_ENCODERS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}
"""By the width of the text encoder that an embedding is for; the widest of several."""

SMALL_FORMATS = {"float32": "f", "float64": "d", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
                 "uint8": "B", "bool": "?"}  # fmt: skip
"""The dtypes whose values `small_values` reads, as `struct` codes; it makes bfloat16 from halves."""

_MAX_SHOWN = 8
"""Kinds of modules, and words, in a line of text."""

_CALLED = {
    "lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "ia3": "IA3", "oft": "OFT", "boft": "BOFT",
    "vera": "VeRA", "mixed": "LoRA and related types", "textual_inversion": "textual inversion",
}  # fmt: skip

Mixed = Literal["mixed"]


class AdapterDocument(TypedDict):
    """An addition to a model: an adapter (LoRA or a related type), or the embedding of new words.

    Attributes:
        kind: ``"lora"``, ``"dora"``, ``"loha"``, ``"lokr"``, ``"ia3"``, ``"oft"``, ``"boft"``, ``"vera"``,
            ``"textual_inversion"``; ``"mixed"``: modules are of several.
        layout: whose names they are: ``"peft"``, ``"kohya"``, ``"diffusers"``; ``None``: another's.
        rank: of every module, as shapes and records say; ``"mixed"``: they differ or contradict; ``None``: it has none.
        ranks: those there are, ascending; at most 50.
        alpha: of every module, likewise; ``None``: it is not recorded.
        modules: that are adapted, or words that are embedded.
        targets: how many there are of each kind of module, the most frequent first; for embeddings, how many vectors a
            word has for each text encoder.  At most 50.
        others: tensors beside, which are not an adapter's.
        base: the model that it was made for; ``None``: unknown.
        told_by: where this is known from: ``"adapter_config.json"``, ``"metadata"``; ``"names"``: names and shapes make
            it likely.
    """

    kind: str
    layout: str | None
    rank: int | Mixed | None
    ranks: list[int]
    alpha: float | Mixed | None
    modules: int
    targets: dict[str, int]
    others: int
    base: str | None
    told_by: str | None


def is_adapter(names: Sequence[str]) -> bool:
    """Whether the tensors are an adapter's: at least half of the first names are."""
    names = names[:_SAMPLED]
    text = "\n".join(names)
    if not any(word in text for word in ("lora", *_KINDS)):  # nor does any match, then
        return False
    return 2 * sum(_PART.search(name) is not None for name in names) >= len(names) > 0


def is_embedding(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are embeddings of new words."""
    names = list(islice(checkpoint.state_dict.everything, 3))
    return checkpoint.origin.state_path == EMBEDDINGS or (0 < len(names) <= 2 and all(map(_EMBEDDING.fullmatch, names)))


def customs(names: Sequence[str]) -> str | None:
    """Whose customs all the names of an adapter follow: ``"peft"``, ``"kohya"``, ``"diffusers"``."""
    if all(name.startswith("base_model.") for name in names):
        return "peft"
    if all(map(_SCRIPTS.match, names)):
        return "kohya"
    return "diffusers" if all(name.startswith(_PIPELINES) for name in names) else None


def adapter_in(checkpoint: Checkpoint, text: str) -> AdapterDocument | None:
    """The addition in the state_dict; ``None``: it is not an adapter and has none in it.

    Args:
        checkpoint: as it was read.
        text: the names of the state_dict, each after a line break.
    """
    if is_embedding(checkpoint):
        return _embedding(checkpoint)
    # Of adapters without this word a file holds nothing else: its first names tell.
    if "lora" not in text and not is_adapter(list(islice(checkpoint.state_dict, _SAMPLED))):
        return None
    modules: dict[str, _Module] = {}
    names: list[str] = []
    for name, entry in checkpoint.state_dict.items():
        found = _PART.search(name)
        if found is not None:
            names.append(name)
            modules.setdefault(name[: found.start()], _Module()).add(found, entry.shape)
    if not modules:
        return None
    alphas = {module: checkpoint.state_dict.get(f"{module}.alpha") for module in modules}
    layout = customs(names)
    recorded = {**_recorded(checkpoint.metadata), **(_beside(checkpoint) if layout == "peft" else {})}
    ranks = {rank for module in modules.values() for rank in module.ranks} | recorded.get("ranks", set())
    targets = Counter(map(_target, modules))
    kinds = {kind for module in modules.values() for kind in module.kinds}
    if "dora" in kinds:  # which is a way to scale others
        kinds -= {"lora"} if kinds <= {"lora", "dora"} else {"dora"}
    base, told_by = recorded.get("base"), recorded.get("told_by")
    if base is None:
        base = _base(modules)
        told_by = None if base is None else "names"
    return {
        "kind": kinds.pop() if len(kinds) == 1 else "mixed",
        "layout": layout,
        "rank": _one(ranks),
        "ranks": sorted(ranks)[:_MAX_TARGETS],
        "alpha": _one(_alphas(alphas) or recorded.get("alphas", set())),
        "modules": len(modules),
        "targets": dict(targets.most_common(_MAX_TARGETS)),
        "others": len(checkpoint.state_dict) - len(names) - sum(alpha is not None for alpha in alphas.values()),
        "base": base,
        "told_by": told_by,
    }


class _Module:
    """An adapter's parts for one module: their shapes, and the kinds of adapters they belong to."""

    __slots__ = ("kinds", "shapes")

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, found: re.Match[str], shape: tuple[int, ...]) -> None:
        other = found["kin"] or found["other"] or ("dora" if found["lora"] == "magnitude_vector" else "lora")
        self.kinds.add(_KINDS.get(other.partition("_")[0], "lora"))
        part = found["lora"] or found["factor"]
        if part and len(shape) > 1:  # not a bias, nor a magnitude
            self.shapes[part] = shape

    @property
    def ranks(self) -> Iterator[int]:
        """The facts that each shape shows."""
        cores = {part[1]: shape[0] for part, shape in self.shapes.items() if part in ("t1", "t2")}
        for part, shape in self.shapes.items():
            if part in _DOWN:
                yield shape[0]
            elif part in _UP:
                yield shape[1]
            elif part[2:]:  # a factor of LyCORIS; with a core between them the rank comes first in both
                yield cores.get(part[1]) or shape[part.endswith("a")]


def _one(values: set[Any]) -> Any:
    """What all say; ``"mixed"``: they say different things."""
    return "mixed" if len(values) > 1 else next(iter(values), None)


def _target(module: str) -> str:
    """The kind of a module: its last name, with numbers that follow; of names without dots what follows the last."""
    if "." not in module:
        return re.sub(r"(?s)\A.*_[0-9]+_(?=[^0-9])", "", _SCRIPTS.sub("", module))
    parts = module.split(".")
    at = next((at for at in range(len(parts) - 1, 0, -1) if not parts[at].isdecimal()), 0)
    return ".".join(parts[at:])


def _base(modules: Mapping[str, _Module]) -> str | None:
    """The model that has such modules, if that is clear."""
    for blocks, base in _BASES:
        if any(map(blocks.search, modules)):
            return base
    widths = {
        module.shapes[part][1]
        for name, module in modules.items()
        for part in ("A", "down")
        if part in module.shapes and _CROSS_ATTENTION.search(name) and any(block in name for block in _UNET)
    }
    return _CONTEXTS.get(widths.pop()) if len(widths) == 1 else None


def _alphas(entries: Mapping[str, TensorEntry | None]) -> set[float]:
    """The values of alphas that are beside each module; none if one cannot be read, or there are too many."""
    listed = [entry for entry in entries.values() if entry is not None]
    values = [small_values(entry, 1) for entry in listed] if len(listed) <= _MAX_READ else [None]
    return set() if None in values else {float(value[0]) for value in values if value is not None}


def small_values(entry: TensorEntry, count: int) -> tuple[float, ...] | None:
    """The values of a small tensor; ``None``: it is larger, or they cannot be read directly."""
    source, code = entry.storage.source, SMALL_FORMATS.get(entry.dtype)
    if entry.numel != count or not can_be_looked_at(source) or not entry.is_contiguous:
        return None
    order = "<" if entry.storage.byteorder == "little" else ">"
    try:
        data = source.read(entry.storage_offset * entry.itemsize, entry.nbytes)
    except CkptkitError:
        return None  # reading the tensor itself will report the problem
    if entry.dtype == "bfloat16":  # the upper half of a float32
        return tuple(
            struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in struct.unpack(f"{order}{count}H", data)
        )
    return None if code is None else struct.unpack(f"{order}{count}{code}", data)


def _recorded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Ranks, alphas and base from the metadata of a safetensors file."""
    found: dict[str, Any] = {}
    config = _parsed(metadata.get("lora_adapter_metadata"))  # of diffusers: those of peft, each after its component
    alphas = {_number(value) for key, value in config.items() if key.endswith("lora_alpha")} - {None}
    if alphas:
        found["alphas"] = alphas
    for field, key in (("ranks", "ss_network_dim"), ("alphas", "ss_network_alpha")):
        number = _number(metadata.get(key))
        if number is not None:
            found[field] = {number}
    named = next((metadata[key] for key in _BASE_KEYS if isinstance(metadata.get(key), str) and metadata[key]), None)
    if named is not None:
        found.update(base=named.removesuffix("/lora")[:_MAX_TEXT], told_by="metadata")
    return found


def _beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """The same from peft's configuration, if it is beside the file."""
    source = next((entry.storage.source for entry in checkpoint.state_dict.values()), None)
    if not isinstance(source, ByteRange):
        return {}
    try:
        file = source.file.sibling(_CONFIG)
    except CkptkitError:
        return {}
    try:
        config = _parsed(file.tail(_CONFIG_NBYTES).decode("utf-8", "replace"))
    except CkptkitError:
        return {}
    finally:
        file.close()
    found, base = _of_config(config), config.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        found.update(base=base[:_MAX_TEXT], told_by=_CONFIG)
    return found


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks and alphas of a configuration of peft; where some modules have others, no more than that is known."""
    found: dict[str, Any] = {}
    for field, key, others in (("ranks", "r", "rank_pattern"), ("alphas", "lora_alpha", "alpha_pattern")):
        number = _number(config.get(key))
        if number is not None and not config.get(others):
            found[field] = {number}
        elif number is not None and field == "alphas":
            found[field] = {number, *filter(None, map(_number, _mapping(config.get(others)).values()))}
    return found


def _parsed(text: str | None) -> Mapping[str, Any]:
    """A JSON object; an empty one if the text is not one."""
    try:
        return _mapping(json.loads(text or "null"))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | int | None:
    """A number, or text that is one."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number == int(number) else number


def _embedding(checkpoint: Checkpoint) -> AdapterDocument:
    """For a textual inversion: how many vectors each word has, and which text encoder has their width."""
    shapes = {name: entry.shape for name, entry in checkpoint.state_dict.items() if 0 < len(entry.shape) < 3}
    vectors = {name: shape[0] if len(shape) > 1 else 1 for name, shape in islice(shapes.items(), _MAX_TARGETS)}
    beside = dict(mapping_items(checkpoint.rest) or [])
    base, told_by = beside.get("sd_checkpoint_name"), "metadata"
    if not isinstance(base, str) or not base:
        wide = max((shape[-1] for shape in shapes.values()), default=0)
        base, told_by = _ENCODERS.get(wide), "names"
    return {
        "kind": "textual_inversion",
        "layout": None,
        "rank": None,
        "ranks": [],
        "alpha": None,
        "modules": len(shapes),
        "targets": vectors,
        "others": len(checkpoint.state_dict) - len(shapes),
        "base": base if base is None else base[:_MAX_TEXT],
        "told_by": None if base is None else told_by,
    }


def adapter_text(found: AdapterDocument) -> str:
    """It in a line."""
    parts = [_CALLED.get(found["kind"], found["kind"])]
    if found["layout"] is not None:
        parts[0] += f" ({found['layout']}'s names)"
    if found["rank"] is not None:
        parts.append(f"rank{'s' * (len(found['ranks']) > 1)} {listed(map(str, found['ranks']), 6)}")
    if found["alpha"] is not None:
        parts.append(f"alpha {found['alpha'] if found['alpha'] == 'mixed' else format(found['alpha'], 'g')}")
    if found["kind"] == "textual_inversion":
        words = [f"{printable(name):.60} ({count_of(count, 'vector')})" for name, count in found["targets"].items()]
        parts.append(f"of {listed(words, _MAX_SHOWN, total=found['modules'])}")
    else:
        kinds = [f"{printable(name):.60} ({count:,})" for name, count in found["targets"].items()]
        parts.append(f"on {count_of(found['modules'], 'module')}: {listed(kinds, _MAX_SHOWN)}")
    line = ", ".join(parts)
    if found["others"]:
        line += f"; {count_of(found['others'], 'other tensor')} beside it"
    if found["base"] is not None:
        told = "as its names and shapes are" if found["told_by"] == "names" else f"says {found['told_by']}"
        line += f"; for {printable(found['base'])}, {told}"
    return line
