"""Files of ranks as one checkpoint: what several of them hold, by name, joined to one tree.

A folder whose files' names differ only in one number is read here without rules: Llama's ``consolidated.00.pth``,
``consolidated.01.pth``, ... beside ``params.json``, and any for which rules are given
(`ckptkit.formats.distributed.tensor_parallel`).  The weights are the file's own dict, or what is under ``module``,
``model`` or ``state_dict``; what is beside them is the first rank's, but for an optimizer's state, which is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError, LimitError, UnsupportedError
from ckptkit.formats.containers import SUFFIXES
from ckptkit.formats.distributed.folder import FolderSource, read_part
from ckptkit.formats.distributed.layouts import LLAMA, is_llama
from ckptkit.formats.distributed.tensor_parallel import INSIDE, LLAMA_RULES, Joiner, Rule, ending, shown_name
from ckptkit.formats.format import Probe
from ckptkit.formats.json_text import parse, shown, state_dict_node
from ckptkit.formats.shards import Shard, merged_findings, merged_globals
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict, Object, attributes, mapping_items, named_items, tensors_in
from ckptkit.report import Finding, count_of, listed

__all__ = [
    "args_of",
    "as_of_one",
    "beside",
    "flat",
    "member",
    "merged",
    "mesh_of",
    "nested",
    "numbered",
    "read",
    "read_ranks",
    "require_one_run",
    "same_said",
    "sliced",
    "stated",
]  # fmt: skip

_LISTED = 5
"""Names that a message lists."""

_PIPED = re.compile(r"layer_(\d{1,7})-model_(\d{1,7})-model_states\.pt", re.ASCII)
"""The files of a DeepSpeed pipeline with tensor parallelism."""

_MOST_RANKS = 1 << 20
"""Processes that may have saved a checkpoint."""

_OTHERS = ("optim", "rng", "random_state", "scheduler")
"""Words in the names of what ranks have beside the weights."""

_LEVELS = 16
"""Dicts inside dicts, as in `ckptkit.normalize.nested`."""

# Trees of dicts, and values beside them.


def flat(node: object, where: str) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """The values of a state_dict, or of dicts inside dicts, by the keys that lead to them (`INSIDE` between).

    Args:
        node: the outermost dict.
        where: whose it is, for messages.

    Returns:
        The values; and torch's ``_metadata`` of each dict that has such, by the keys that lead to it.

    Raises:
        CorruptError: it is not one, or is nested too deeply.
        LimitError: it has more tensors, or longer names, than any model.
    """
    values: dict[str, object] = {}
    versions: dict[str, dict[str, object]] = {}
    limits, characters = DEFAULT_LIMITS, [0]

    def gather(node: object, pairs: list[tuple[object, object]], path: str, level: int) -> None:
        state = attributes(node)
        if state is not None and (known := named_items(state.get("_metadata"))):
            versions[path.removesuffix(INSIDE)] = dict(known)
        for key, value in pairs:
            if not isinstance(key, str) or INSIDE in key or level > _LEVELS:
                raise CorruptError(f"the model in {where} is not a state_dict: {shown(key)} is a key in it")
            below = None if key.endswith("_extra_state") else mapping_items(value)
            if below:
                gather(value, below, f"{path}{key}{INSIDE}", level + 1)
            else:
                characters[0] += len(path) + len(key)
                if characters[0] > limits.name_characters:
                    what = "characters of the tensors' names"
                    raise LimitError(what, limit=limits.name_characters, actual=characters[0], where=where)
                values[path + key] = value
                if len(values) > limits.entries:
                    raise LimitError("tensors of a model", limit=limits.entries, actual=len(values), where=where)

    pairs = mapping_items(node)
    if pairs is None:
        raise CorruptError(f"there is no state_dict in {where}")
    gather(node, pairs, "", 1)
    return values, versions


def nested(values: Mapping[str, object], versions: Mapping[str, Mapping[str, object]]) -> object:
    """The dicts that `flat` was given, of other values.

    Raises:
        CorruptError: a name is used by a tensor and by a dict of tensors.
    """

    def made(values: Mapping[str, object], at: str) -> object:
        pairs: dict[str, object] = {}
        groups: dict[str, dict[str, object]] = {}
        for name, value in values.items():
            key, inside, rest = name.partition(INSIDE)
            if key in pairs and not (inside and key in groups):
                raise CorruptError(f"the name {shown(shown_name(at + name))} appears twice")
            if inside:
                groups.setdefault(key, {})[rest] = value
            pairs[key] = value
        for key, inner in groups.items():
            pairs[key] = made(inner, f"{at}{key}{INSIDE}")
        return state_dict_node(pairs, versions.get(at.removesuffix(INSIDE)))

    return made(values, "")


def stated(values: Mapping[str, object]) -> tuple[dict[str, object], list[Finding]]:
    """The values of a model without what is the state of no module: an ``_extra_state`` that is ``None``."""
    empty = [name for name, value in values.items() if value is None and name.endswith("_extra_state")]
    if not empty:
        return dict(values), []
    names = [shown_name(name) for name in empty]
    message = f"{count_of(len(names), '`_extra_state`', 'that is', 'that are')} None: {listed(names, _LISTED)}"
    found = Finding(code="empty-extra-state", severity="info", message=f"left out: {message}")
    gone = set(empty)
    return {name: value for name, value in values.items() if name not in gone}, [found]


def beside(
    root: object, models: Sequence[str | None], joiner: Joiner, *, is_whole: bool = False
) -> list[tuple[object, object]]:
    """The values in a rank's dict beside its weights that do not differ by rank.

    Tensors of numbers are one rank's share of an optimizer's state, and are left out, which the joiner reports; dicts
    with other values (the state of random generators) are used.

    Args:
        root: the dict.
        models: the keys of the weights.
        joiner: of the weights.
        is_whole: whether there is only one rank, so that everything is used.
    """
    kept = []
    for key, value in mapping_items(root) or []:
        if key in models:
            continue
        tensors = [node for node in tensors_in(value) if isinstance(node, TensorEntry) and node.numel > 1]
        if is_whole:
            kept.append((key, value))
        elif any("float" in tensor.dtype for tensor in tensors):
            joiner.left.append(shown(key))
        else:
            kept.append((key, value))
            if tensors:
                joiner.taken.append(shown(key))
    return kept


_ONE = re.compile(r"(?:tensor_|pipeline_|expert_|expert_tensor_)?model_parallel_size|expert_tensor_parallel_size")
"""Megatron's arguments that say over how many ranks a model is split."""


def args_of(root: object) -> Mapping[str, Any]:
    """Megatron's description of its run: a Namespace, or a dict."""
    args = member(root, "args")
    state = attributes(args)
    return dict(named_items(args if state is None else state))


def mesh_of(args: Mapping[str, Any]) -> dict[str, int] | None:
    """Over how many ranks Megatron's model is split, by kind; ``None``: it is not, or that is not said."""
    ours = {key: size for key, size in args.items() if _ONE.fullmatch(key) and type(size) is int}
    found = {re.sub("_(?:model_)?parallel_size", "", key): size for key, size in ours.items() if 1 < size < _MOST_RANKS}
    return found or None


def as_of_one(pairs: Sequence[tuple[object, object]]) -> list[tuple[object, object]]:
    """Megatron's values beside a model, with ``args`` that describe several ranks instead of one."""
    return [(key, _of_one(value) if key == "args" else value) for key, value in pairs]


def _of_one(args: object) -> object:
    state = args if isinstance(args, InertDict) else attributes(args)
    if state is None or not any(isinstance(key, str) and _ONE.fullmatch(key) for key, _ in state.pairs):
        return args
    changed = InertDict()
    for key, value in state.pairs:
        is_size = isinstance(key, str) and _ONE.fullmatch(key) is not None and type(value) is int
        virtual = key == "virtual_pipeline_model_parallel_size"
        changed.pairs.append((key, None if virtual else 1 if is_size else value))
    if not isinstance(args, Object):
        return changed
    copy = Object(args.how, args.cls, args.args, args.kwargs)
    copy.items, copy.pairs, copy.state, copy.effects = args.items, args.pairs, changed, args.effects
    return copy


# Folders that consist of ranks alone.

_OF_A_RUN = (
    *("iteration", "checkpoint_version", "step", "global_step", "global_steps", "epoch"),
    *("ds_version", "dp_world_size", "mp_world_size"),
)
"""Keys of what is the same in the files of all ranks."""

_FIRST, _DEGREES = "mp_rank_00_model_states.pt", "checkpoint_parallel_dimensions"
"""What DeepSpeed has beside the layers of a pipeline, and where it says over how many ranks they are split."""

_MODELS = r"mp_rank_\d+_model_states\.pt"
"""What that is called, of each rank of tensor and pipeline parallelism."""

_COUNTS = ("mp_world_size",)
"""Keys under which DeepSpeed says how many ranks a model is split over."""


def read_ranks(probe: Probe, files: Mapping[str, str]) -> dict[str, RawCheckpoint]:
    """The content of the ranks' files.

    Args:
        probe: of the folder.
        files: by what messages call the rank.

    Raises:
        LimitError: they are more than any checkpoint has.
        FormatError: one is damaged or refused.
    """
    if len(files) > probe.limits.shards:
        raise LimitError("ranks of one checkpoint", limit=probe.limits.shards, actual=len(files))
    return {rank: read_part(probe, name) for rank, name in files.items()}


def merged(
    raws: Mapping[str, RawCheckpoint],
    root: object,
    joiner: Joiner,
    findings: Iterable[Finding] = (),
    mesh: Mapping[str, int] | None = None,
) -> RawCheckpoint:
    """The checkpoint that ranks make up.

    Args:
        raws: the content of their files.
        root: the tree of all.
        joiner: what their tensors were joined by.
        findings: other findings.
        mesh: as in `RawCheckpoint`.
    """
    shards = {rank: Shard(rank, raw, {}) for rank, raw in raws.items()}
    writers = {raw.writer for raw in raws.values()}
    return RawCheckpoint(
        root=root,
        format="megatron",
        byteorder="big" if {raw.byteorder for raw in raws.values()} == {"big"} else "little",
        writer=writers.pop() if len(writers) == 1 else None,
        globals=merged_globals(shards),
        discarded=tuple(value for raw in raws.values() for value in raw.discarded),
        has_pickle=any(raw.has_pickle for raw in raws.values()),
        findings=(*merged_findings(shards), *joiner.findings(), *findings),
        replicas=tuple(joiner.replicas),
        world_size=len(raws),
        mesh=mesh,
    )


def numbered(names: Iterable[str]) -> list[str]:
    """The files of a folder whose names differ only in one number, in its order; none if they are not ranks.

    Files whose extension is not a checkpoint's, optimizer files and the like are skipped, and so is everything beside
    Llama's.

    Raises:
        CorruptError: a number is left out.
    """
    names = list(names)
    if is_llama(names):
        names = [name for name in names if re.fullmatch(LLAMA, name, re.ASCII)]
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        is_one = "/" not in name and name.endswith(tuple(SUFFIXES)) and not any(word in name for word in _OTHERS)
        for found in re.finditer("[0-9]{1,6}", name) if is_one else ():
            groups.setdefault((name[: found.start()], name[found.end() :]), {})[int(found[0])] = name
    several = [group for group in groups.values() if len(group) > 1]
    if len(several) != 1:
        return []
    (group,) = several
    first = 0 if is_llama(names) else min(min(group), 1)
    if missing := [number for number in range(first, max(group)) if number not in group]:
        told = f"{count_of(len(missing), 'rank', 'is', 'are')} missing before {group[max(group)]}"
        raise CorruptError(f"{told}: {listed(map(str, missing), _LISTED)}")
    return [group[number] for number in sorted(group)]


def sliced(names: Iterable[str]) -> list[str]:
    """The files of a folder that hold slices: those of DeepSpeed's layers by rank, or as `numbered`.

    Raises:
        CorruptError: a number is left out.
    """
    names = list(names)
    return [name for name in names if _PIPED.fullmatch(name)] or numbered(names)


def require_one_run(roots: Mapping[str, object]) -> None:
    """Check that the files of ranks are from one run and step, as far as they say.

    Raises:
        CorruptError: they say different things.
    """
    (first, own), *others = roots.items()
    for rank, root in others:
        for key in _OF_A_RUN:
            if not same_said(a := member(own, key), b := member(root, key)):
                raise CorruptError(
                    f"{first} says {key} {a!r:.60}, {rank} says {b!r:.60}: they are from different steps or runs"
                )


def same_said(a: object, b: object) -> bool:
    """Whether two values are equal, if they are plain."""
    plain = (bool, int, float, str, type(None))
    return not isinstance(a, plain) or not isinstance(b, plain) or a == b or (a != a and b != b)


def read(probe: Probe, rules: Sequence[Rule]) -> RawCheckpoint:
    """The checkpoint of a folder whose files differ in one number of their names: Llama's, or any by its rules.

    Raises:
        FormatError: a file is missing, damaged or refused, or no rule says how tensors are joined.
    """
    folder = probe.file
    names = sliced(folder.names if isinstance(folder, FolderSource) else ())
    if names and _PIPED.fullmatch(names[0]):
        return _of_layers(probe, names, rules)
    if not names:
        raise CorruptError("the files in the folder do not come from several ranks")
    raws = read_ranks(probe, {name: name for name in names})
    first = raws[names[0]].root
    require_one_run({name: raw.root for name, raw in raws.items()})
    for said in _COUNTS:
        if type(count := member(first, said)) is int and count != len(names):
            raise CorruptError(f"{names[0]} says {said} {count:,}, but there are {count_of(len(names), 'file')}")
    key = next((key for key in ("module", "model", "state_dict") if mapping_items(member(first, key))), None)
    trees = {rank: raw.root if key is None else member(raw.root, key) for rank, raw in raws.items()}
    ranks = {rank: flat(tree, rank) for rank, tree in trees.items()}
    values = {rank: found for rank, (found, _) in ranks.items()}
    if is_llama(names):
        rules = (*rules, *LLAMA_RULES, *_embeddings(probe, values))
    joiner = Joiner(rules)
    model = nested(joiner.join(values), ranks[names[0]][1])
    joiner.left += _optimizers(probe)
    if key is None:
        return merged(raws, model, joiner)
    pairs = [(name, 1 if name in _COUNTS else value) for name, value in beside(first, (key,), joiner)]
    return merged(raws, InertDict([*pairs, (key, model)]), joiner)


def _of_layers(probe: Probe, names: Sequence[str], rules: Sequence[Rule]) -> RawCheckpoint:
    """DeepSpeed's pipeline, a file for each layer and tensor-parallel rank; names begin with the layer's number."""
    files: dict[tuple[int, int], str] = {}
    for match in filter(None, map(_PIPED.fullmatch, names)):
        files[int(match[2]), int(match[1])] = match[0]
    raws = read_ranks(probe, {name: name for name in names})
    pairs: list[tuple[object, object]] = []
    joiner = Joiner(rules)
    degree = max(rank for rank, _ in files) + 1
    if _FIRST in getattr(probe.file, "names", ()):
        raws[_FIRST] = raw = read_part(probe, _FIRST)
        pairs = [(k, 1 if k in _COUNTS else v) for k, v in beside(raw.root, ("module", _DEGREES), joiner)]
        said = member(member(raw.root, _DEGREES), "tp_degree")
        degree = max(degree, said) if type(said) is int and said < _MOST_RANKS else degree
    layers = sorted({layer for _, layer in files})
    places = ((rank, layer) for layer in layers for rank in range(degree))
    missing = [f"rank {place[0]} of layer {place[1]}" for place in places if place not in files]
    if missing:
        raise CorruptError(f"{count_of(len(missing), 'file')} missing: {listed(missing, _LISTED)}", names=missing)
    ranks: dict[str, dict[str, object]] = {}
    for (rank, layer), name in sorted(files.items()):
        values, _ = flat(raws[name].root, name)
        own = ranks.setdefault(f"tensor rank {rank}", {})
        own.update((f"{layer}{INSIDE}{key}", value) for key, value in values.items())
    model = {shown_name(key): value for key, value in joiner.join(ranks).items()}
    joiner.left += _optimizers(probe)
    whole = merged(raws, InertDict([*pairs, ("module", state_dict_node(model, None))]), joiner)
    copies = member(raws[_FIRST].root, "dp_world_size") if _FIRST in raws else None
    models = sum(re.fullmatch(_MODELS, name, re.ASCII) is not None for name in getattr(probe.file, "names", ()))
    world = models * copies if type(copies) is int and 0 < copies < _MOST_RANKS else None
    return replace(whole, world_size=world, mesh={"tensor": degree})


def _optimizers(probe: Probe) -> list[str]:
    """The files of optimizers in a folder, which are left out."""
    names = [name for name in getattr(probe.file, "names", ()) if "optim" in name and name.endswith(tuple(SUFFIXES))]
    return [listed(names, 1)] if names else []


def member(node: object, key: str) -> object:
    """The value under a key of a dict; ``None``: there is none."""
    return dict(named_items(node)).get(key)


def _embeddings(probe: Probe, ranks: Mapping[str, Mapping[str, object]]) -> Iterator[Rule]:
    """How Llama's embeddings are split: known from the model's width, which all its norms have.

    Raises:
        CorruptError: the slices are not those of so many ranks.
        UnsupportedError: there are fewer heads of keys and values than ranks.
    """
    values = next(iter(ranks.values()))
    shapes = {name: value.shape for name, value in values.items() if isinstance(value, TensorEntry)}
    norm, rows = shapes.get("norm.weight", ()), shapes.get("tok_embeddings.weight", ())
    given = _params(probe)
    if type(heads := given.get("n_kv_heads")) is int and heads < len(ranks):
        raise UnsupportedError(
            f"{count_of(heads, 'head')} of keys and values on {len(ranks)} ranks: several ranks have a copy of one, "
            "and ckptkit cannot join them"
        )
    dim = given.get("dim", norm[0] if len(norm) == 1 else None)
    outputs = shapes.get("layers.0.attention.wo.weight", ())
    odd = {"layers.0.attention.wo.weight": outputs} if len(outputs) == 2 and "head_dim" not in given else {}
    odd = {name: shape for name, shape in odd.items() if shape[0] == dim and shape[1] * len(ranks) != dim}
    if len(rows) == 2 and isinstance(dim, int) and dim not in (rows[1], rows[1] * len(ranks)):
        odd["tok_embeddings.weight"] = rows
    for name, shape in odd.items():
        raise CorruptError(
            f"{count_of(len(ranks), 'file')}, each with {[*shape]} of {name}, do not make up a model of width {dim:,}: "
            "some are missing, or belong to another model"
        )
    if len(rows) == 2 and isinstance(dim, int):
        yield ending(r"tok_embeddings\.weight", 0 if rows[1] == dim else 1)


def _params(probe: Probe) -> dict[str, object]:
    """The content of ``params.json``, if there is one."""
    folder = probe.file
    if not isinstance(folder, FolderSource) or "params.json" not in folder.names:
        return {}
    file = folder.part("params.json")
    if file.size > probe.limits.record_nbytes:
        raise LimitError("bytes of params.json", limit=probe.limits.record_nbytes, actual=file.size)
    document = parse(file.read(0, file.size), probe.limits, "params.json")
    file.release()
    return document if isinstance(document, dict) else {}
