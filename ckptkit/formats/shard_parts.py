"""Whether a file is a part of a checkpoint: what its tree says, what it is called, what is beside it, in one answer.

The tree decides if it can (`ckptkit.normalize.parts`); otherwise an index beside a file decides, and the names that
these writers give to the files of several processes:

- ``huggingface_hub``: ``model-00001-of-00002.safetensors``, and whatever an index names
- ``torch.distributed.checkpoint``: ``__0_0.distcp``; Megatron's ``common.pt`` and Lightning's ``meta.pt`` beside them
- FSDP: ``model_world_size_4_rank_0.pt`` (verl and others), ``pytorch_model_fsdp_rank0.bin`` (accelerate)
- DeepSpeed: ``zero_pp_rank_0_mp_rank_00_optim_states.pt``, ``mp_rank_00_model_states.pt`` (the weights of one of
  several tensor-parallel ranks), ``layer_00-model_states.pt`` of a pipeline, ``layer_0_expert_1_mp_rank_00_...``,
  ``zero/NAME/fp32.pt`` of a universal checkpoint
- Megatron-LM, NeMo: one folder a rank, ``mp_rank_00_000/``, ``tp_rank_00_pp_rank_000/``
- Llama: ``consolidated.00.pth``
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Literal, NamedTuple

from ckptkit import places
from ckptkit.bytesource import Source
from ckptkit.checkpoint import Part
from ckptkit.errors import CkptkitError, FileAccessError, PartError
from ckptkit.formats.shards import CUSTOMARY, indexes_in, name_of
from ckptkit.normalize.parts import part_text

__all__ = ["known_as", "names_in", "part_error", "part_of"]


class _Rule(NamedTuple):
    """How a writer calls its files: ``n`` of the pattern is the number of one, ``of`` how many there are.

    One that is ``alone`` is a part whatever is beside it; ``word`` is the numbered thing.
    """

    pattern: str
    layout: str
    lacks: str
    alone: bool = True
    word: str = "rank"


_SLICES = "the other ranks have the other slices of its tensors"
_DCP = "a torch.distributed.checkpoint folder"

_RULES = (
    _Rule(r"(?:__(?P<n>\d+)_\d+|.+)\.distcp", _DCP, "it has some slices, and .metadata says where they belong"),
    _Rule(
        r".*world_size_(?P<of>\d+)_rank_(?P<n>\d+)\.\w+", "an FSDP checkpoint with one file per rank", _SLICES, False
    ),
    _Rule(
        r"pytorch_model_fsdp(?:_\d+)?_rank(?P<n>\d+)\.bin", "an FSDP checkpoint with one file per rank", _SLICES, False
    ),
    _Rule(
        r"shard-(?P<n>\d{5})-.+\.safetensors",
        "a torch.distributed.checkpoint of safetensors files",
        "its tensors are slices of those in the whole checkpoint",
        word="shard",
    ),
    _Rule(
        r"(?:\w+_)?zero_pp_rank_(?P<n>\d+)_mp_rank_\d+_?(?:model|optim)_states\.pt",
        "a DeepSpeed ZeRO checkpoint",
        "the other ranks have the other slices",
    ),
    _Rule(
        r"(?:\w*?layer_\d+_)?expert_(?P<n>\d+)_mp_rank_\d+_model_states\.pt",
        "a DeepSpeed mixture of experts",
        "it contains one expert",
        word="expert",
    ),
    _Rule(
        r"expp_rank_(?P<n>\d+)_mp_rank_\d+_optim_states\.pt",
        "a DeepSpeed mixture of experts",
        "it contains one rank's share of the optimizer state",
    ),
    _Rule(
        r"layer_(?P<n>\d+)-model(?:_\d+-model)?_states\.pt",
        "a DeepSpeed pipeline checkpoint",
        "it contains one layer, without the layer's name",
        word="layer",
    ),
    _Rule(r"mp_rank_(?P<n>\d+)_model_states\.pt", "a DeepSpeed checkpoint with model parallelism", _SLICES, False),
    _Rule(r"consolidated\.(?P<n>\d+)\.\w+", "a Llama checkpoint in tensor-parallel parts", _SLICES, False),
)

_MARKS = (".distcp", "rank", "shard-", "layer_", "consolidated.")
"""One of these is in every name that a rule fits."""

_MEGATRON = r"(?:mp|tp)_rank_(\d+)(?:_(?:pp_rank_)?(\d+))?(?:_(\d+))?"
_UNIVERSAL = r"(?:fp32|exp_avg|exp_avg_sq|step)\.pt"
_NUMBERED = r"((?:rank|shard|part|layer|expert|consolidated)[._-]?|__)[0-9]+"
"""Words before numbers that distinguish the files of one checkpoint."""

_MOST_LISTED = 10_000
"""Names of a folder that are examined."""


def part_of(file: Source, said: Part | Literal["whole"] | None) -> Part | None:
    """The checkpoint that a file is part of; ``None``: it is whole, as far as is known.

    Args:
        file: the file.
        said: what its tree says (`ckptkit.normalize.parts.part_in`).
    """
    if isinstance(said, Part):
        named = _by_name(file)
        return _placed(replace(said, piece=named.piece if named is not None and named.piece else said.piece), file)
    part = _shard(file) or (_by_name(file) if said is None else None)
    return None if part is None else _placed(part, file)


def known_as(name: str) -> tuple[str, bool] | None:
    """The layout whose files, or folders, have such names, and whether a single one of them is a part."""
    ruled = _ruled(name)
    if ruled is not None:
        rule, found = ruled
        of, number = (int(found.groupdict().get(group) or 0) for group in ("of", "n"))
        return rule.layout, rule.alone or of > 1 or number > 0
    ranks = re.fullmatch(_MEGATRON, name, re.ASCII)
    return None if ranks is None else ("a Megatron checkpoint", any(int(number or 0) for number in ranks.groups()))


def part_error(file: Source) -> PartError:
    """The error for a file that is known as a part by its name, and cannot be opened by itself."""
    from ckptkit.normalize.parts import CODE, way_out

    part = _placed(_by_name(file) or Part(layout=_DCP, lacks="it is one of several files"), file)
    return PartError(f"{CODE}: {part_text(part)}; {way_out(part)}", path=file.path)


def _shard(file: Source) -> Part | None:
    """As one of the shards of an index, or by a shard's customary name."""
    folder, name = _place(file)
    customary = CUSTOMARY.fullmatch(name) if "-of-" in name else None
    count = int(customary[3]) if customary is not None else 0
    layout, lacks = "a sharded checkpoint", "the other tensors are in the other shards"
    usual = _usual_indexes(customary[1], customary[4]) if count > 1 and customary is not None else ()
    for index in indexes_in(folder) if _is_listed(file) else usual:
        shards = _shards_of(file, index)
        if name in shards and (len(shards) > 1 or count > 1):
            piece = f"shard {int(customary[2])} of {count}" if customary is not None else f"one of {len(shards)} shards"
            whole = places.shown(places.below(folder, index))
            return Part(layout=layout, piece=piece, lacks=lacks, instead=whole, opens=True)
    if customary is None or count < 2:
        return None
    opens = _is_listed(file) and name in _own_of(folder or os.curdir)
    return Part(
        layout=layout,
        piece=f"shard {int(customary[2])} of {count}",
        lacks=lacks if opens else f"{lacks}, and there is no index beside it that names them all",
        instead=places.shown(folder or os.curdir) if opens else None,
        opens=opens,
    )


def _usual_indexes(stem: str, ending: str) -> tuple[str, ...]:
    """What the index of a shard is called; for that of a variant (``model.fp16-00001-of-00002``), what it may be."""
    whole, _, variant = stem.rpartition(".")
    return f"{stem}{ending}.index.json", *((f"{whole}{ending}.index.{variant}.json",) if whole else ())


_known: dict[str, tuple[tuple[int, int], frozenset[str]]] = {}


def _shards_of(file: Source, name: str) -> frozenset[str]:
    """The shards in an index beside a file, which is read once while it does not change."""
    from ckptkit.formats.sharded import shard_names

    if file.is_far and _is_listed(file):
        index = places.below(str(file.folder), name)
        noted: dict[str, frozenset[str]] = places.notes()
        if index not in noted:
            noted[index] = shard_names(index)
        return noted[index]
    if file.folder is None or file.is_far:
        try:
            return shard_names(file.sibling(name))
        except FileAccessError:
            return frozenset()
    index = os.path.join(file.folder, name)
    try:
        facts = os.stat(index)
    except OSError:
        return frozenset()
    stamp = (facts.st_mtime_ns, facts.st_size)
    if index not in _known or _known[index][0] != stamp:
        _known[index] = stamp, shard_names(index)
    return _known[index][1]


def _ruled(name: str) -> tuple[_Rule, re.Match[str]] | None:
    """The first rule that fits a name."""
    for rule in _RULES if any(mark in name for mark in _MARKS) else ():
        found = re.fullmatch(rule.pattern, name, re.ASCII)
        if found is not None:
            return rule, found
    return None


def _by_name(file: Source) -> Part | None:
    """As what a process of several wrote, by what it and its folder are called."""
    folder, name = _split(file)
    ruled = _ruled(name)
    if ruled is not None:
        rule, found = ruled
        of, number = (found.groupdict().get(group) for group in ("of", "n"))
        count = int(of) if of else _ranks_beside(_names(file, folder), found)
        if not rule.alone and count < 2 and (of or not int(number or 0)):
            return None
        known = number is not None and count > max(1, int(number) - (rule.word == "shard"))  # shards count from 1
        piece = "" if number is None else f"{rule.word} {int(number)}" + (f" of {count}" if known else "")
        return Part(layout=rule.layout, piece=piece, lacks=rule.lacks)
    above, parent = places.split(folder)
    ranks = re.fullmatch(_MEGATRON, parent, re.ASCII) if "rank" in parent else None
    beside = len(_folders_alike(file)) if ranks is not None else 0
    if ranks is not None and (beside > 1 or any(int(number or 0) for number in ranks.groups())):
        piece = f"{parent}, one of {beside} folders," if beside > 1 else parent
        return Part(layout="a Megatron checkpoint", piece=piece, lacks=_SLICES)
    if places.split(above)[1] == "zero" and re.fullmatch(_UNIVERSAL, name):
        return Part(layout="a DeepSpeed universal checkpoint", lacks=f"it contains one tensor, of {parent!r:.80}")
    if name in ("common.pt", "meta.pt") and _is_dcp(file):
        return Part(layout=_DCP, lacks="the tensors are in the .distcp files")
    return None


# The files beside it, if they can be listed.


def _is_listed(file: Source) -> bool:
    """Whether it is known what is beside a file, or costs no more than to look at one name."""
    return file.folder is not None and places.is_known(file.folder)


def _place(file: Source) -> tuple[str, str]:
    """The folder a file is in, as reached from here, and its name."""
    folder, name = places.split(name_of(file))
    return (file.folder, name) if file.is_far and file.folder is not None else (folder, name)


def _split(file: Source) -> tuple[str, str]:
    """The folder a file is in, by its whole path, and its name."""
    return _place(file) if file.folder is None or file.is_far else os.path.split(os.path.abspath(name_of(file)))


def _names(file: Source, folder: str) -> list[str]:
    """As `names_in`, of a folder that a file is in, or that its folder is in."""
    return [] if file.folder is None else names_in(folder)


def _is_dcp(file: Source) -> bool:
    """Whether the folder is one of torch.distributed.checkpoint."""
    return file.folder is not None and places.exists(places.below(file.folder, ".metadata"))


def _placed(part: Part, file: Source) -> Part:
    """The part with the folder of the files that belong together, or with a file made from them."""
    if part.instead is not None or file.folder is None:
        return part
    folder, name = _place(file)
    above = _above(folder)
    if places.split(folder)[1] == "sharded" and (indexes := indexes_in(above)):  # of consolidate_safetensors_files
        return replace(part, instead=places.shown(places.below(above, indexes[0])), opens=True)
    found = None
    if len(_alike(file)) > 1 or _is_dcp(file):
        found = folder or os.curdir
    elif len(_folders_alike(file)) > 1:
        found = above
    elif re.search(r"(?:^|/)zero/[^/]+/?$", _split(file)[0].replace(os.sep, "/")):
        found = _above(above)
    elif name.endswith("_states.pt") and sum(each.endswith("_states.pt") for each in names_in(folder)) > 1:
        found = folder or os.curdir
    if found is None:
        return part
    return replace(part, instead=places.shown(found), opens=_opens(found))


def _above(folder: str) -> str:
    """The folder that one is in, as reached from here."""
    above, own = places.split(folder)
    if places.is_url(folder):
        return above
    return above or os.curdir if own not in ("", os.curdir, os.pardir) else os.path.join(folder, os.pardir)


def _opens(folder: str) -> bool:
    """Whether ckptkit opens a folder as one checkpoint."""
    return bool(_own_of(folder))


def _own_of(folder: str) -> tuple[str, ...]:
    """The files of the checkpoint that a folder is; empty: it is none."""
    from ckptkit.formats.distributed.around import sharded_at

    try:
        found = sharded_at(folder)
    except CkptkitError:
        return ()
    return () if found is None else found.own


def _alike(file: Source) -> list[str]:
    """Names in a file's folder that differ from its own only in a rank's (shard's, layer's) number, and its own."""
    folder, name = _place(file)
    pattern = re.escape(re.sub(_NUMBERED, "\\1\0", name)).replace("\0", "[0-9]+")
    return [each for each in _names(file, folder) if re.fullmatch(pattern, each)]


def _ranks_beside(names: list[str], found: re.Match[str]) -> int:
    """How many files there are of a name with another number, and this one."""
    if found["n"] is None:
        return 1
    before, after = re.escape(found.string[: found.start("n")]), re.escape(found.string[found.end("n") :])
    return sum(re.fullmatch(f"{before}[0-9]+{after}", each) is not None for each in names)


def _folders_alike(file: Source) -> list[str]:
    """Folders beside a file's own that differ from it only in ranks' numbers and have such a file, and its own."""
    folder, name = _split(file)
    above, own = places.split(folder)
    if re.fullmatch(_MEGATRON, own, re.ASCII) is None:
        return []
    names = [each for each in _names(file, above) if re.fullmatch(_MEGATRON, each, re.ASCII)]
    return [each for each in names if places.exists(places.below(above, f"{each}/{name}"))]


def names_in(folder: str) -> list[str]:
    """The names in a folder, sorted, or as many as are examined; empty if it cannot be listed."""
    try:
        with places.scandir(folder) as listing:
            return sorted(entry.name for entry, _ in zip(listing, range(_MOST_LISTED), strict=False))
    except OSError:
        return []
