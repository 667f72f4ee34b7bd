"""Which layout a folder has, by the names of its files and, if they do not decide, by their content."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ckptkit import places
from ckptkit.formats.format import HEAD_NBYTES
from ckptkit.startup import dataclass

__all__ = ["LAYOUTS", "LLAMA", "MEGATRON", "RANKED", "SHARDED", "Layout", "is_llama", "is_metadata"]

RANKED = (
    r"(?:(?P<stem>[^/]*?)(?:(?:^|(?<=[._-]))world_size_(?P<of>\d+))?[._-])?"
    r"rank[_-]?(?P<rank>\d+)(?P<end>\.(?:bin|ckpt|pkl|pth|pt|tar))"
)
"""The names of FSDP's files: the stem is the part that those of one checkpoint have in common."""

SHARDED = r"shard-(?P<n>\d{5})-model-(?P<file>\d{5})-of-(?P<of>\d{5})\.safetensors"
"""The names of the hub writer's files: of which rank, from 1, and of which file once consolidated."""

MEGATRON = (
    r"(?P<folder>(?:mp|tp)_rank_(?P<tensor>\d+)(?:_(?:pp_rank_)?(?P<second>\d+))?(?:_(?:ep_rank_)?(?P<third>\d+))?)/"
    r"(?P<file>model_optim_rng\.pt|model_rng\.pt|[^/]+\.ckpt)"
)
"""The files of Megatron's and NeMo's ranks, each in a separate folder with the numbers of the rank."""

LLAMA = r"consolidated\.\d+\.pth"
"""The files of Llama's ranks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a folder shows that it is one of a layout.

    Attributes:
        format: name of its format (`ckptkit.formats.containers`).
        claims: whether the files belong to one, by their paths below the folder and, if names do not decide, by their
            content.
    """

    format: str
    claims: Callable[[str, tuple[str, ...]], bool]


def _named(pattern: str, least: int = 1) -> Callable[[str, tuple[str, ...]], bool]:
    """Whether so many files have such names."""
    return lambda folder, names: (
        sum("/" not in name and re.fullmatch(pattern, name, re.ASCII) is not None for name in names) >= least
    )


def _dcp(folder: str, names: tuple[str, ...]) -> bool:
    own = [name for name in names if "/" not in name]
    has_metadata = any(re.fullmatch(r"(?:__\d+)?\.metadata", name, re.ASCII) for name in own)
    is_one = (
        any(re.fullmatch(r"__\d+_\d+\.distcp", name, re.ASCII) for name in own)
        or (has_metadata and any(name.endswith(".distcp") for name in own))
        or (".metadata" in own and _is_metadata(folder))
    )
    return is_one and not _megatron(folder, names)


def _is_metadata(folder: str) -> bool:
    """Whether the ``.metadata`` of a folder without items is that of torch.distributed.checkpoint."""
    try:
        return is_metadata(places.head(places.below(folder, ".metadata"), HEAD_NBYTES))
    except OSError:
        return False


def is_metadata(head: bytes) -> bool:
    """Whether the first bytes of a plain pickle are those of a ``.metadata`` of torch.distributed.checkpoint."""
    return re.search(rb"torch\.distributed\.(?:_shard\.)?checkpoint\.", head) is not None


def _megatron(folder: str, names: tuple[str, ...]) -> bool:
    backend = _names_backend(folder, names)
    is_dist = sum((".metadata" in names, "common.pt" in names, backend)) > 1
    return is_dist or any(re.fullmatch(MEGATRON, name, re.ASCII) for name in names) or is_llama(names)


def _names_backend(folder: str, names: tuple[str, ...]) -> bool:
    """Whether the ``metadata.json`` of a folder is Megatron's, which says how the tensors were written."""
    if "metadata.json" not in names:
        return False
    try:
        return b'"sharded_backend"' in places.head(places.below(folder, "metadata.json"), HEAD_NBYTES)
    except OSError:
        return False


def is_llama(names: Iterable[str]) -> bool:
    """Whether several of the files are Llama's; a single one is a file like any other."""
    return sum(re.fullmatch(LLAMA, name, re.ASCII) is not None for name in names) > 1


def _fsdp(folder: str, names: tuple[str, ...]) -> bool:
    """Whether files with ranks' numbers belong to one checkpoint: by their names, or by tensors that are spread.

    ``lora_rank8.pth`` has such a number too, but is whole: ranks count from 0, without gaps.
    """
    found = [match for name in names if (match := re.fullmatch(RANKED, name, re.ASCII))]
    ranks: dict[tuple[str, str], set[int]] = {}
    for match in found:
        if match["of"] or "fsdp" in (match["stem"] or ""):
            return True
        ranks.setdefault((match["stem"] or "", match["end"]), set()).add(int(match["rank"]))
    if any(len(numbers) > 1 and numbers == {*range(len(numbers))} for numbers in ranks.values()):
        return True
    return any(_is_spread(places.below(folder, match[0])) for match in found[:_LOOKED_AT])


def _is_spread(path: str) -> bool:
    """Whether a file names classes, or parameters, of tensors that are spread over processes: near its beginning."""
    try:
        data = places.head(path, _PICKLE_NBYTES)
    except OSError:
        return False
    return any(mark in data for mark in _SPREAD)


_SPREAD = (b"DTensor", b"ShardedTensor", b"flat_param")
_LOOKED_AT, _PICKLE_NBYTES = 3, 1 << 20
"""Files whose first bytes are searched, with the number of bytes: the pickle is there, before the tensors."""

LAYOUTS: tuple[Layout, ...] = (
    Layout("dcp", _dcp),
    Layout("megatron", _megatron),
    Layout(
        "deepspeed",
        _named(r"(?:\w+_)?(?:zero_pp_rank_\d+_)?mp_rank_\d+_?(?:model|optim)_states\.pt|layer_\d+-model.*_states\.pt"),
    ),
    Layout("fsdp", _fsdp),
    Layout("safetensors-dcp", _named(SHARDED)),
)
"""The order in which layouts are tried for a folder: the first that claims it reads it."""
