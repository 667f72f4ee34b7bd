"""Megatron's checkpoints of several ranks.

Two layouts have the name.  ``torch_dist`` is a torch.distributed.checkpoint folder, whose tensors know their places
(`ckptkit.formats.distributed.megatron_dist`).  The older one (``megatron/training/checkpointing.py``) is a folder a
rank, ``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`` for the ranks of tensor, pipeline and expert parallelism (NeMo:
``tp_rank_TT_pp_rank_PPP/``), each with a dict of

- ``args``: a Namespace, which says how many ranks there are; ``checkpoint_version``; ``iteration``
- ``model``: the rank's state_dict, or dicts inside dicts; of a virtual pipeline ``model0``, ``model1``, ..., whose
  layers follow one another in the order of their numbers and then of the stages
- ``optimizer`` and everything else needed to continue; with a distributed optimizer the file is ``model_rng.pt``, and
  buffers are in ``distrib_optim.pt`` or ``optim.pt`` beside it

Slices are joined by the rules of `ckptkit.formats.distributed.tensor_parallel`.  Layers are counted from 0 in each
stage, and experts in each rank: they get the numbers that they have in the whole.  What two stages hold, and the copy
of tied embeddings that the last stage has for its outputs, is compared and kept once.  Before ``checkpoint_version`` 1
the rows of a rank's queries, keys and values were three matrices, and in version 1 otherwise ordered than now: they are
joined, stay in that order, and a finding says so.  An optimizer's state is not merged.  ``args`` say over how many
ranks a model is split, and are made to say one.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError, UnsupportedError
from ckptkit.formats.distributed import slices
from ckptkit.formats.distributed.folder import folder_of
from ckptkit.formats.distributed.layouts import MEGATRON
from ckptkit.formats.distributed.slices import (
    args_of,
    as_of_one,
    beside,
    flat,
    member,
    merged,
    mesh_of,
    nested,
    read_ranks,
    require_one_run,
    same_said,
    stated,
)
from ckptkit.formats.distributed.tensor_parallel import INSIDE, MEGATRON_RULES, Joiner, Rule, ending, shown_name
from ckptkit.formats.format import Probe
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict, mapping_items, named_items
from ckptkit.report import Finding, count_of, listed
from ckptkit.startup import dataclass

__all__ = ["read"]

_LISTED = 5
"""Names that a message lists."""

_MOST_MISSING = 1000
"""Ranks that an error names."""

_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")

_OF_A_RANK = re.compile(r"rank|host|node|device|dir|path|port|addr|time|memory")
"""Arguments of a run that its processes may differ in."""

_LAYER = re.compile(rf"((?:.*?[.{INSIDE}])?layers)([.{INSIDE}])([0-9]+)(?=[.{INSIDE}]|\Z)", re.DOTALL)

_EXPERT = re.compile(
    rf"(.*[.{INSIDE}](?:local_experts[.{INSIDE}]|experts[.{INSIDE}]linear_fc[12][.{INSIDE}](?:weight|bias)))"
    rf"([0-9]+)((?:[.{INSIDE}].*)?)",
    re.DOTALL,
)

_HEAD = re.compile(
    rf"(?:.*[.{INSIDE}])?word_embeddings_for_head[.{INSIDE}]weight|(?:model[.])?word_embeddings[.]weight", re.DOTALL
)
"""The last stage's copy of the word embeddings: Megatron's, and NeMo's."""

_OUTPUT = re.compile(rf"(?:.*[.{INSIDE}])?output_layer[.{INSIDE}]weight", re.DOTALL)
_EMBEDDING = re.compile(rf"(?:.*[.{INSIDE}])?embedding[.{INSIDE}]word_embeddings[.{INSIDE}]weight", re.DOTALL)


@dataclass(slots=True)
class _Stage:
    """A part of the model with its own layers.

    Attributes:
        where: what messages call it.
        expert: the rank of its experts.
        values: by name, as in the file.
        versions: module versions, by the keys that lead to the dict that has them.
    """

    where: str
    expert: int
    values: dict[str, object]
    versions: dict[str, dict[str, object]]


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the facts of a folder.

    Raises:
        FormatError: a file is missing, damaged or refused, ranks do not belong together, or no rule says how tensors
            are joined.
    """
    folder = folder_of(probe)
    if ".metadata" in folder.names or "metadata.json" in folder.names:
        from ckptkit.formats.distributed.megatron_dist import read as read_dist

        return read_dist(probe)
    rules: tuple[Rule, ...] = folder.tp_rules
    found = [match for name in folder.names if (match := re.fullmatch(MEGATRON, name, re.ASCII))]
    return _of_ranks(probe, found, rules) if found else slices.read(probe, rules)


def _of_ranks(probe: Probe, found: Sequence[re.Match[str]], rules: tuple[Rule, ...]) -> RawCheckpoint:
    """The checkpoint of a folder a rank."""
    names = sorted({match["file"] for match in found})
    if len(names) > 1:
        raise CorruptError(
            f"the folders of ranks contain files with several names: {listed(names, _LISTED)}", names=names
        )
    raws = read_ranks(probe, {match["folder"]: match[0] for match in found})
    first = raws[found[0]["folder"]].root
    args = args_of(first)
    grid = _grid(found, args)
    _require_one_run({rank: raw.root for rank, raw in raws.items()})
    version = member(first, "checkpoint_version")
    if not isinstance(version, (int, float)):
        version = 0 if names[0].endswith("_rng.pt") else 3  # NeMo has none, and began with the present order
    groups = args.get("num_query_groups")
    if isinstance(groups, int) and args.get("group_query_attention") and groups < len({key[0] for key in grid}):
        raise UnsupportedError(f"{groups:,} groups of queries over more ranks: each has a part of one")
    gated = args.get("swiglu")
    joiner = Joiner((*rules, *_before(version), *MEGATRON_RULES), gated if isinstance(gated, bool) else None)
    keys = _models(first)
    stages: dict[tuple[int, int], list[_Stage]] = {}
    for key in keys:
        for _, pipeline, expert in sorted({(0, *place[1:]) for place in grid}):
            together = {
                rank: raws[rank].root for place, rank in sorted(grid.items()) if place[1:] == (pipeline, expert)
            }
            stage = _stage(together, key, expert, joiner)
            stages.setdefault((keys.index(key), pipeline), []).append(stage)
    several = [stages[place] for place in sorted(stages)]
    _require_order(several, {place: args_of(raws[rank].root).get("rank") for place, rank in grid.items()})
    _require_layers(several, args)
    values, versions = _whole(several, joiner)
    values, empty = stated(values)
    findings = [
        *empty,
        *_tied(values, args, len(several), joiner),
        *_vocabulary(values, args),
        *_order(values, version),
    ]
    findings += _buffers(probe, names[0])
    model = nested(values, versions)
    if keys == [None]:
        return merged(raws, model, joiner, findings, mesh_of(args))
    named = "model" if len(keys) > 1 or keys[0] is None else keys[0]
    pairs = as_of_one(beside(first, keys, joiner, is_whole=len(raws) == 1))
    return merged(raws, InertDict([*pairs, (named, model)]), joiner, findings, mesh_of(args))


# Which ranks there are, and whether they belong together.


def _grid(found: Sequence[re.Match[str]], args: Mapping[str, Any]) -> dict[tuple[int, int, int], str]:
    """The folder of each rank, by its place in tensor, pipeline and expert parallelism.

    Raises:
        CorruptError: some are missing, or there are more than the run had.
    """
    said = [size if type(size := args.get(key)) is int and size > 0 else None for key in _SIZES]
    if said[0] is None and type(size := args.get("model_parallel_size")) is int:
        said[0] = size
    grid: dict[tuple[int, int, int], str] = {}
    for match in found:
        tensor, second, third = (int(match[kind] or 0) for kind in ("tensor", "second", "third"))
        is_expert = match["third"] is None and (said[1] or 1) == 1 and (said[2] or 1) > 1
        place = (tensor, 0, second) if is_expert else (tensor, second, third)
        if place in grid:
            raise CorruptError(f"{grid[place]} and {match['folder']} are the same rank")
        grid[place] = match["folder"]
    _require_all(grid, [said[axis] or max(place[axis] for place in grid) + 1 for axis in range(3)])
    return grid


def _require_all(grid: Mapping[tuple[int, int, int], str], sizes: Sequence[int]) -> None:
    """See that there is a folder for each rank, and no other.

    Raises:
        CorruptError: there is not.
    """
    named = zip(sizes, ("tensor", "pipeline", "expert"), strict=True)
    words = " x ".join(f"{size} {word}" for size, word in named if size > 1)
    odd = sorted(folder for place, folder in grid.items() if any(a >= n for a, n in zip(place, sizes, strict=True)))
    if odd:
        raise CorruptError(f"the run had {words or 'one'} parallel ranks; {listed(odd, _LISTED)} is not one of them")
    count = math.prod(sizes)
    if len(grid) < count:
        every = itertools.product(*map(range, sizes))
        missing = [
            f"tensor rank {t}, pipeline rank {p}" + (f", expert rank {e}" if sizes[2] > 1 else "")
            for t, p, e in itertools.islice((place for place in every if place not in grid), _MOST_MISSING)
        ]
        raise CorruptError(
            f"{count_of(count - len(grid), 'rank', 'is', 'are')} missing, of {words}: {listed(missing, _LISTED)}",
            names=missing,
        )


def _require_one_run(roots: Mapping[str, object]) -> None:
    """See that the files of ranks are of one run and step.

    Raises:
        CorruptError: they say different things.
    """
    require_one_run(roots)
    (first, own), *others = roots.items()
    for rank, root in others:
        a_args, b_args = args_of(own), args_of(root)
        for key in sorted(a_args.keys() | b_args.keys()):
            if _OF_A_RANK.search(key) is None and not same_said(a := a_args.get(key), b := b_args.get(key)):
                raise CorruptError(
                    f"{first} says args.{key} {a!r:.60}, {rank} says {b!r:.60}: they are from different runs"
                )
        if _models(own) != _models(root):
            raise CorruptError(
                f"{first} and {rank} do not have models under the same keys: they are from different runs"
            )


def _models(root: object) -> list[str | None]:
    """The keys of a rank's models, in order; ``None``: the file is its state_dict."""
    keys = [key for key, value in named_items(root) if mapping_items(value) is not None]
    chunks = sorted((key for key in keys if re.fullmatch(r"model\d{1,4}", key)), key=lambda key: int(key[5:]))
    if chunks:
        return list(chunks)
    found = next((key for key in ("model", "state_dict", "module") if key in keys), None)
    if found is None and not {"args", "checkpoint_version", "iteration"}.isdisjoint(
        key for key, _ in named_items(root)
    ):
        raise CorruptError("there is no model in the files of the ranks")
    return [found]


# The parts of the model.


def _before(version: float) -> Iterator[Rule]:
    """The rules for what was stored otherwise before ``checkpoint_version`` 1: three, or two, matrices in one."""
    if version < 1:
        yield ending(r"query_key_value\.(?:weight|bias)", 0, 3)
        yield ending(r"key_value\.(?:weight|bias)", 0, 2)


def _stage(ranks: Mapping[str, object], key: str | None, expert: int, joiner: Joiner) -> _Stage:
    """A stage, its tensor-parallel ranks joined."""
    first = next(iter(ranks))
    trees = {rank: flat(root if key is None else member(root, key), rank) for rank, root in ranks.items()}
    slices = {rank: values for rank, (values, _) in trees.items()}
    values = joiner.join(slices)
    grouped = [shown_name(name) for name in values if re.search(rf"experts[.{INSIDE}]weight[12]\Z", name)]
    if grouped and (len(ranks) > 1 or expert):
        raise UnsupportedError(
            f"experts that are stored as slices of one matrix: {listed(grouped, _LISTED)}", names=grouped
        )
    return _Stage(first if key in (None, "model") else f"{key} of {first}", expert, values, trees[first][1])


def _layers(stage: _Stage) -> dict[str, set[int]]:
    """The numbers of a stage's layers, by what is before them."""
    found: dict[str, set[int]] = {}
    for name in stage.values:
        match = _LAYER.match(name)
        if match is not None and len(match[3]) < 7:
            found.setdefault(match[1], set()).add(int(match[3]))
    return found


def _require_order(stages: Sequence[Sequence[_Stage]], ranks: Mapping[tuple[int, int, int], object]) -> None:
    """See that the stages, and the ranks of each, are where they belong.

    Args:
        stages: in the order of their layers.
        ranks: the number of each place among all processes, from ``args``: it grows along each kind of parallelism.

    Raises:
        CorruptError: some are missing, as far as this can be known.
    """
    for number, (stage, *_) in enumerate(stages):
        for name in stage.values:
            if (_OUTPUT.fullmatch(name) or _HEAD.fullmatch(name)) and number + 1 < len(stages):
                raise CorruptError(
                    f"{stage.where} contains {shown_name(name)}, which belongs to the last stage: ranks were mixed up"
                )
    inputs = [number for number, stage in enumerate(stages) if any(map(_EMBEDDING.fullmatch, stage[0].values))]
    if inputs and inputs[0]:
        where = stages[inputs[0]][0].where
        raise CorruptError(
            f"{where} contains the word embeddings, which belong to the first stage: ranks were mixed up"
        )
    if len(set(ranks.values())) < len(ranks):  # what converters write says nothing of ranks
        return
    for axis in range(3):
        for place, rank in ranks.items():
            following = place[0] + (axis == 0), place[1] + (axis == 1), place[2] + (axis == 2)
            after = ranks.get(following)
            if isinstance(rank, int) and isinstance(after, int) and after < rank:
                raise CorruptError(
                    f"args say that rank {rank} is at {place}, and rank {after} at {following}: mixed up"
                )


def _require_layers(stages: Sequence[Sequence[_Stage]], args: Mapping[str, Any]) -> None:
    """See that the stages have all the layers.

    Raises:
        CorruptError: the run had others.
    """
    counts: dict[str, int] = {}
    for copies in stages:
        for prefix, numbers in _layers(copies[0]).items():
            counts[prefix] = counts.get(prefix, 0) + len(numbers)
    main = [(prefix, count) for prefix, count in counts.items() if "mtp" not in prefix]
    count = args.get("num_layers")
    if len(main) == 1 and type(count) is int and count != main[0][1]:
        raise CorruptError(f"args.num_layers is {count:,}, but the stages contain {count_of(main[0][1], 'layer')}")


def _whole(
    stages: Sequence[Sequence[_Stage]], joiner: Joiner
) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """The values, and the module versions, of all stages under the names that they have in the whole.

    Args:
        stages: in the order of their layers; of each those of all experts' ranks.
        joiner: which compares what several have.
    """
    values: dict[str, object] = {}
    holders: dict[str, str] = {}
    versions: dict[str, dict[str, object]] = {}
    before: dict[str, int] = {}
    for copies in stages:
        shift = {}
        for prefix, numbers in _layers(copies[0]).items():
            begin, count = before.get(prefix, 0), len(numbers)
            if len(stages) > 1 and numbers not in (set(range(count)), set(range(begin, begin + count))):
                raise CorruptError(f"{copies[0].where}: layers of {shown_name(prefix)} are missing")
            shift[prefix] = 0 if len(stages) == 1 or numbers != set(range(count)) else begin
            before[prefix] = begin + count
        for stage in copies:
            experts = _experts(stage)
            for name, value in stage.values.items():
                own = _numbered(name, shift, stage.expert * experts)
                if own not in values:
                    values[own], holders[own] = value, stage.where
                elif isinstance(value, TensorEntry) and not name.endswith("_extra_state"):
                    known = values[own]
                    if isinstance(known, TensorEntry):
                        joiner.same(shown_name(own), known, value, f"{holders[own]} and {stage.where}")
            for at, known_versions in stage.versions.items():
                target = versions.setdefault(at, {})
                for path, version in known_versions.items():
                    before_it = f"{at}{INSIDE}" if at else ""
                    target[_numbered(before_it + path, shift, stage.expert * experts)[len(before_it) :]] = version
    return values, versions


def _experts(stage: _Stage) -> int:
    """How many experts a rank has."""
    numbers = {int(match[2]) for name in stage.values if (match := _EXPERT.fullmatch(name)) and len(match[2]) < 7}
    return max(numbers, default=-1) + 1


def _numbered(name: str, shift: Mapping[str, int], experts: int) -> str:
    """A name with the numbers of its layer and its expert in the whole."""
    match = _LAYER.match(name)
    if match is not None and shift.get(match[1]) and len(match[3]) < 7:
        name = f"{match[1]}{match[2]}{int(match[3]) + shift[match[1]]}{name[match.end() :]}"
    match = _EXPERT.fullmatch(name) if experts else None
    if match is not None and len(match[2]) < 7:
        name = f"{match[1]}{int(match[2]) + experts}{match[3]}"
    return name


# Findings.


def _tied(values: dict[str, object], args: Mapping[str, Any], stages: int, joiner: Joiner) -> Iterator[Finding]:
    """Take away the last stage's copy of embeddings that are tied to its outputs."""
    embedding = next((value for name, value in values.items() if _EMBEDDING.fullmatch(name)), None)
    is_tied = stages > 1 and args.get("untie_embeddings_and_output_weights") is False
    for name in [name for name in values if _HEAD.fullmatch(name) or (is_tied and _OUTPUT.fullmatch(name))]:
        copy = values[name]
        if isinstance(embedding, TensorEntry) and isinstance(copy, TensorEntry):
            joiner.same(shown_name(name), embedding, copy, "the first and the last stage: tied embeddings")
            del values[name]
            message = (
                f"{shown_name(name)} is the last stage's copy of the word embeddings, which are in the checkpoint once"
            )
            yield Finding(code="taken-of-one-rank", severity="info", message=message)


def _vocabulary(values: Mapping[str, object], args: Mapping[str, Any]) -> Iterator[Finding]:
    padded, true = args.get("padded_vocab_size"), args.get("vocab_size", args.get("orig_vocab_size"))
    embedding = next((value for name, value in values.items() if _EMBEDDING.fullmatch(name)), None)
    if not isinstance(embedding, TensorEntry) or type(padded) is not int or padded == true:
        return
    rows = embedding.shape[0] if embedding.shape else 0
    tokens = f"the first {true:,} are tokens" if type(true) is int else "the files do not say how many are tokens"
    yield Finding(
        code="padded-vocabulary",
        severity="info" if rows == padded else "warning",
        message=f"the word embeddings have {padded:,} rows, which gives each rank the same number: {tokens}"
        if rows == padded
        else f"args.padded_vocab_size is {padded:,}, but the word embeddings have {rows:,} rows",
    )


def _order(values: Mapping[str, object], version: float) -> Iterator[Finding]:
    names = [shown_name(name) for name in values if "query_key_value" in name or "key_value" in name]
    if version < 2 and names:
        order = "three matrices: all queries, keys, values" if version < 1 else "by head, dimension and matrix"
        yield Finding(
            code="old-qkv-order",
            severity="warning",
            message=f"checkpoint_version {version}: the rows of {count_of(len(names), 'tensor')} are in an older order "
            f"({order}), which Megatron changes when it loads them: {listed(names, _LISTED)}",
        )


def _buffers(probe: Probe, name: str) -> Iterator[Finding]:
    """The other files in the ranks' folders."""
    names = getattr(probe.file, "names", ())
    others = [each for each in names if re.match(r"(?:mp|tp)_rank_\d", each) and os.path.basename(each) != name]
    if others:
        yield Finding(
            code="not-merged",
            severity="warning",
            message=f"the state of the distributed optimizer is not merged: {listed(others, _LISTED)}",
        )
