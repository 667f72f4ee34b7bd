"""Noteworthy facts about a checkpoint: findings, each with the command that fixes it.

They are computed from the common representation: no tensor byte is read, nothing is loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ckptkit.checkpoint import Checkpoint, StateDict, Storage, TensorEntry, shared_storages, tied_groups
from ckptkit.dtypes import DTYPES
from ckptkit.formats import format_named
from ckptkit.normalize.adapters import customs, is_adapter, is_embedding
from ckptkit.normalize.modules import MODULE, inner_module_told, may_be_wrapped, unwrapped, wrapper_of
from ckptkit.normalize.parts import CODE, part_findings
from ckptkit.normalize.sections import brief, step
from ckptkit.normalize.selection import discarded_text, holding_suffix, other_parts, other_weights
from ckptkit.normalize.shapes import are_data
from ckptkit.normalize.tensors import FoundTensor, other_tensors
from ckptkit.pickling.inert import Global, Object, mapping_items, walk
from ckptkit.report import Finding, apart, convert_command, count_of, gravest_first, human_size, listed, share_of
from ckptkit.shell import command_line
from ckptkit.startup import pattern
from ckptkit.tensor import unordered, unused_nbytes

if TYPE_CHECKING:
    from ckptkit.normalize.quantized import QuantizationDocument

__all__ = ["DIAGNOSES", "Everything", "diagnose", "everything_in", "hostile_finding"]


class Everything(NamedTuple):
    """Everything in a checkpoint that has bytes, found in one walk.

    Attributes:
        beside: everything that `every_tensor` finds but for the plain tensors of the state_dict.
        storages: those of all tensors, and those that are in the tree by themselves, by ``id``.
        is_shared: whether several of these are in one storage.
        unused: bytes of storages that belong to no tensor.
        names: those of the state_dict, each after a line break, so that all are searched at once.
        quantization: how the weights are quantized; ``None``: they are not.
    """

    beside: list[FoundTensor]
    storages: dict[int, Storage]
    is_shared: bool
    unused: int
    names: str
    quantization: QuantizationDocument | None


Diagnosis = Callable[[Checkpoint, Everything], Iterator[Finding]]

_SAMPLED = 32
"""Names that distinguish a state_dict from other mappings of names to tensors."""

_SCALES = ("scale", "absmax", "SCB", "codebook", "Qidxs")
"""Of these one is in the names of every state_dict that has scales."""

_NOTABLE_UNUSED = 1 << 10
"""Bytes below which an oversized storage is not worth a line."""


def diagnose(checkpoint: Checkpoint, contents: Everything | None = None) -> tuple[Finding, ...]:
    """The reader's findings and every diagnosis, most severe first.

    Args:
        checkpoint: as it was read.
        contents: the result of `everything_in`, if known.
    """
    contents = everything_in(checkpoint) if contents is None else contents
    found = [*checkpoint.findings, *(finding for check in DIAGNOSES for finding in check(checkpoint, contents))]
    if checkpoint.part is not None:  # what would fix the whole is refused for a part
        found = [finding if finding.code == CODE else replace(finding, fix=None) for finding in found]
    return tuple(apart(gravest_first(found), checkpoint.origin.options))


def everything_in(
    checkpoint: Checkpoint, beside: list[FoundTensor] | None = None, unused: int | None = None
) -> Everything:
    """The input of the diagnoses.

    Args:
        checkpoint: as it was read.
        beside: the result of `other_tensors`, if known.
        unused: bytes of storages that belong to no tensor, if known.
    """
    beside = other_tensors(checkpoint) if beside is None else beside
    others = [found.node for found in beside if isinstance(found.node, TensorEntry)]
    bare = [found.node for found in beside if isinstance(found.node, Storage)]
    entries = [*checkpoint.state_dict.values(), *others]
    storages = [*[entry.storage for entry in entries], *bare]
    unused = unused_nbytes(entries, bare) if unused is None else unused
    once = dict(zip(map(id, storages), storages, strict=True))
    names = "\n".join(("", *checkpoint.state_dict.everything))
    quantization = None
    if _may_be_quantized(checkpoint.state_dict, names):
        from ckptkit.normalize.quantized import quantization_in  # inspecting starts faster without

        quantization = quantization_in(checkpoint.state_dict)
    return Everything(beside, once, len(once) < len(storages), unused, names, quantization)


def _may_be_quantized(state_dict: StateDict, names: str) -> bool:
    """Whether to search at all: nearly all files have nothing with these dtypes or names."""
    if len(state_dict) != len(state_dict.everything):
        return True
    rows = [DTYPES[dtype] for dtype in {entry.dtype for entry in state_dict.values()}]
    is_small = any(row.itemsize == 1 or not row.is_floating for row in rows)
    return is_small and any(mark in names for mark in _SCALES)


def _hostile(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    for use in checkpoint.globals:
        if use.verdict == "dangerous":
            yield hostile_finding(use.name)


def hostile_finding(name: str) -> Finding:
    """The error that a pickle has a name which runs, imports or opens something."""
    told = f"the pickle names {name}: a loader that executes it would run that"
    return Finding(code="hostile-name", severity="error", message=told)


def _unread(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if checkpoint.unread is not None:
        count = sum(use.count for use in checkpoint.unvouched if use.kind == "unread")
        told = count_of(count, "item", "is a separate pickle and was", "are separate pickles and were")
        yield Finding(
            code="items-not-read",
            severity="info",
            message=f"{told} not read; check, convert and load read every one",
            fix=_checked(checkpoint),
        )


def _copies(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if checkpoint.replicas:
        told = count_of(len(checkpoint.replicas), "copy", "was", "were")
        yield Finding(
            code="copies-not-compared",
            severity="info",
            message=f"{told} not compared with the values that are used; check, convert and load compare each",
            fix=_checked(checkpoint),
        )


def _checked(checkpoint: Checkpoint) -> str:
    """The command that looks into all of a folder."""
    options = checkpoint.origin.options
    typed = [word for name in ("--tag", "--tp-rules") if name in options for word in options[options.index(name) :][:2]]
    return command_line(["ckptkit", "check", checkpoint.origin.path, *typed])


def _part(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    return part_findings(checkpoint)


def _foreign(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    names = _in_values(checkpoint, [use.name for use in checkpoint.globals if use.verdict == "unknown"])
    if not names or checkpoint.module is not None:
        return
    places = _places(checkpoint.rest)
    shown = listed([name + (f" in {places[name]!r}" if places.get(name) else "") for name in names], 4)
    yield Finding(
        code="foreign-objects",
        severity="warning",
        message=f"objects that torch.load refuses by default: {shown}; never executed here",
        fix=_weights(checkpoint, "--weights-only"),
    )


def _in_values(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """The names in the saved values, without those by which a folder says where its files are."""
    is_folder = format_named(checkpoint.origin.format).is_folder
    return [name for name in names if name in _places(checkpoint.rest)] if is_folder and names else names


def _places(root: object) -> dict[str, str]:
    """For each name in the tree, the first key of the root under which it occurs."""
    places: dict[str, str] = {}
    seen: set[int] = set()  # for all keys together: shared parts are searched once
    for key, value in mapping_items(root) or []:
        for node in walk(value, seen):
            if isinstance(node, Global):
                places.setdefault(node.qualified, step(key))
    return places


def _whole_model(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if checkpoint.module is None or any(finding.code == "bound-method" for finding in checkpoint.findings):
        return
    if format_named(checkpoint.origin.format).has_classes:
        return  # values that need no class have their own finding
    cls = getattr(checkpoint.module, "class_name", "?")
    yield Finding(
        code="whole-model",
        severity="warning",
        message=f"a pickled model of class {cls}: torch.load needs its code; the weights are read here without it",
        fix=_extract(checkpoint),
    )


def _weights(checkpoint: Checkpoint, *options: str) -> str | None:
    """The command that writes the weights into a container that can store them; ``None``: there are none."""
    state_dict = checkpoint.state_dict
    if not state_dict.everything:
        return None
    return convert_command(checkpoint.origin.path, *options, suffix=holding_suffix(state_dict))


def _extract(checkpoint: Checkpoint, *options: str) -> str | None:
    """The command that writes only the weights, and says so if there is more."""
    alone = ("--weights-only",) if other_parts(checkpoint) or "--section" in options else ()
    return _weights(checkpoint, *options, *alone)


def _prefix(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    names = list(checkpoint.state_dict.everything) if may_be_wrapped(contents.names) else []
    carrying = [prefix for prefix in map(wrapper_of, names) if prefix]
    if not carrying or any(finding.code == "wrapped-model" for finding in checkpoint.findings):
        return
    plain = [*map(unwrapped, names)]
    bare = Counter(plain)
    twice = next((name for name, each in zip(names, plain, strict=True) if bare[each] > 1), None)
    told = "" if twice is None else f"; it cannot be removed, because two would be called {unwrapped(twice)!r:.60}"
    yield Finding(
        code="module-prefix",
        severity="warning",
        message=f"{share_of(len(carrying), len(names), 'name', 'has', 'have')} a wrapper's prefix "
        f"(`{carrying[0]}`) that the bare model does not have{told}",
        fix=_extract(checkpoint, "--strip-module") if twice is None else None,
    )


def _inner_module(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if f".{MODULE}." not in contents.names:
        return
    names = list(checkpoint.state_dict.everything)
    told = inner_module_told(list(map(unwrapped, names)))
    if told is not None:
        stripped = ["--strip-module"] * any(map(wrapper_of, names))
        message, rules = told
        fix = _extract(checkpoint, *stripped, *rules) if rules else None
        yield Finding(code="inner-module", severity="info", message=message, fix=fix)


def _stale_versions(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    versions = checkpoint.state_dict.versions
    modules = {name.rpartition(".")[0] for name in checkpoint.state_dict.everything} if versions else set()
    if versions and modules and not modules & versions.keys():
        module, recorded = min(modules), max(versions)
        yield Finding(
            code="stale-versions",
            severity="warning",
            message=f"module versions are recorded under other names ({recorded!r:.60}) than the weights have "
            f"({module!r:.60}): the names were changed by hand",
        )


def _not_a_model(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    embeds = is_embedding(checkpoint)
    is_state_dict = checkpoint.origin.kind == "state_dict" or embeds
    if not is_state_dict or checkpoint.module is not None or checkpoint.part is not None:
        return
    if checkpoint.origin.is_program:
        return  # which are run, and have their own findings
    path, names = checkpoint.origin.path, list(islice(checkpoint.state_dict.everything, _SAMPLED))
    what = "build the model, then load these into it"
    fix = f"model.load_state_dict(ckptkit.load_state_dict({path!r}))"
    if is_adapter(names):
        what = "an adapter (LoRA or a related type), to be added to the model it was trained for"
        fix = _adapted(path, names)
    elif embeds:
        what = "a textual inversion, the embedding of a new word for a text encoder"
        fix = f"pipeline.load_textual_inversion({path!r})  # of diffusers"
    elif are_data(names):
        what, fix = "a data set, judging by the names, not weights", f"data = ckptkit.load_state_dict({path!r})"
    yield Finding(code="not-a-model", severity="info", message=f"names and tensors, not a model: {what}", fix=fix)


def _adapted(path: str, names: Sequence[str]) -> str:
    """What adds an adapter to its model, by the customs that its names follow."""
    layout = customs(names)
    if layout == "peft":
        return f"peft.PeftModel.from_pretrained(base_model, {os.path.dirname(path) or '.'!r})"
    if layout is not None:
        return f"pipeline.load_lora_weights({path!r})  # of diffusers"
    return f"model.load_state_dict(ckptkit.load_state_dict({path!r}), strict=False)  # in a model that has its adapters"


def _quantized(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    found = contents.quantization
    if found is not None and len(found["companions"]) > 1:
        names = listed([repr(name) for name in found["companions"]], 6, last=" and ", characters=80)
        yield Finding(
            code="quantized-weights",
            severity="info",
            message=f"the weights of {count_of(found['modules'], 'module')} are quantized: {names} make sense only "
            "together, and a model that is not quantized does not have these names",
        )


_AVERAGED = pattern(r"(?:^|[._])(?:ema|shadow|averaged?)(?:[._]|\d*$)")
"""Keys that identify averaged weights: ``ema``, ``model_ema``, ``params_ema``, ``ema_model.shadow``."""


def _averaged(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    weights = [section.path for section in checkpoint.sections if section.is_weights]
    averaged = [path for path in weights if _AVERAGED.search(path.lower())]
    if averaged and len(averaged) < len(weights):
        raw = next(path for path in weights if path not in averaged)
        yield Finding(
            code="averaged-weights",
            severity="info",
            message=f"averaged (EMA) weights in {averaged[0]!r} beside raw ones in {raw!r}: outputs differ slightly",
            fix=_extract(checkpoint, "--section", averaged[0]),
        )


_ELSEWHERE = (
    (pattern(r"pathlib\.(?:_local\.)?(?:PosixPath|WindowsPath)"), "paths of an operating system"),
    (pattern(r"numpy\._core\..+"), "arrays of numpy 2 or later"),
    (pattern(r"numpy\.core\..+"), "arrays of numpy before 2"),
)
"""Names that load only on some systems or with some versions, and their explanations."""


def _elsewhere(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    names = _in_values(checkpoint, [use.name for use in checkpoint.globals])
    found = [
        f"{what} ({next(name for name in names if known.fullmatch(name))})"
        for known, what in _ELSEWHERE
        if any(known.fullmatch(name) for name in names)
    ]
    if found:
        told = f"objects that load only on the system or with the versions they were saved with: {'; '.join(found)}"
        fix = _weights(checkpoint, "--weights-only")
        yield Finding(code="other-system", severity="info", message=told, fix=fix)


def _order(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    moved = unordered(checkpoint.state_dict)
    if moved:
        share = share_of(len(moved), len(checkpoint.state_dict), "tensor", "is", "are")
        told = f"{share} not contiguous: transposed, sliced or expanded, such as {moved[0]!r:.80}"
        yield Finding(code="not-contiguous", severity="info", message=told)


def _devices(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    places = Counter([storage.location for storage in contents.storages.values()])
    places.pop("cpu", None)
    if not places:
        return
    path, container = checkpoint.origin.path, format_named(checkpoint.origin.format)
    told = "a plain torch.load fails on a machine without these devices"
    fix: str | None = convert_command(path, "--map-location", "cpu", suffix=".pth")
    if container.is_program:
        told = "the program loads onto these devices and fails on a machine without them"
        fix = f"{container.loader}({path!r}, map_location='cpu')" if container.maps_location else None
    yield Finding(
        code="device-location",
        severity="warning",
        message=f"storages tagged {listed([f'{place} ({count})' for place, count in sorted(places.items())])}: {told}",
        fix=fix,
    )


def _ties(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    several = shared_storages(checkpoint.state_dict.values()) if contents.is_shared else set()
    groups = tied_groups(checkpoint.state_dict) if several else []
    sharing = [e for e in checkpoint.state_dict.values() if id(e.storage) in several and e.nbytes] if several else []
    views = Counter({entry.view: id(entry.storage) for entry in sharing}.values())
    if groups:
        shown = listed([listed(names, 3, between=" = ") for names in groups], 3, between="; ")
        yield Finding(
            code="tied-tensors",
            severity="info",
            message=f"{count_of(len(groups), 'tensor', 'has', 'have')} several names: {shown}",
        )
    shared = sum(count for count in views.values() if count > 1)
    if shared:
        yield Finding(
            code="shared-storage",
            severity="info",
            message=f"{shared} tensors are different views of shared storages",
        )


def _unused(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if contents.unused >= _NOTABLE_UNUSED:
        yield Finding(
            code="unused-bytes",
            severity="info",
            message=f"{human_size(contents.unused)} of the file belong to storages but to no tensor: views of larger "
            "tensors",
            fix=_extract(checkpoint),
        )


def _training(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if checkpoint.origin.kind != "resume" or not checkpoint.state_dict:
        return
    storages = [entry.storage for entry in checkpoint.state_dict.values()]
    weighty = {None, *(section.path for section in checkpoint.sections if section.is_weights)}
    for section, _, node, *_ in contents.beside:
        if section in weighty and not isinstance(node, Object):
            storages.append(node.storage if isinstance(node, TensorEntry) else node)
    weights = {id(storage): storage.nbytes for storage in storages}
    everything = sum(storage.nbytes for storage in contents.storages.values())
    beside = everything - sum(weights.values())
    if beside > 0:
        yield Finding(
            code="training-state",
            severity="info",
            message=f"{human_size(beside)} ({beside / max(checkpoint.origin.size, 1):.0%} of the file) are not weights",
            fix=_weights(checkpoint, "--weights-only"),
        )


def _discarded(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if checkpoint.discarded:
        kept = "" if checkpoint.origin.is_program else "; a .pth cannot keep it"
        yield Finding(
            code="discarded-call",
            severity="warning",
            message=f"the pickle makes {discarded_text(checkpoint.discarded)} and discards the result, which belongs "
            f"to nothing in the file{kept}",
            fix=_weights(checkpoint, "--weights-only"),
        )


def _other_weights(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    others = other_weights(checkpoint, contents.beside)
    if others:
        shown = listed([f"{path!r:.200} ({count_of(len(found), 'tensor')})" for path, found in others.items()], 4)
        yield Finding(
            code="other-parts",
            severity="info",
            message=f"weights under other names than the selected ones: {shown}; they are parts of the model, or of "
            "another one",
        )


def _outside(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    outside = {id(found.node): found for found in contents.beside if found.section is None}
    if outside:
        yield Finding(
            code="outside-sections",
            severity="info",
            message=f"{count_of(len(outside), 'tensor')} in no section but in attributes or objects: "
            + listed([f"{found.path:.100} ({brief(found.node)})" for found in outside.values()], 5),
        )


def _nothing(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if checkpoint.origin.kind == "other":
        yield Finding(code="no-tensors", severity="warning", message="the file contains no tensors")


def _byteorder(checkpoint: Checkpoint, contents: Everything) -> Iterator[Finding]:
    if checkpoint.origin.byteorder == "big":
        yield Finding(code="big-endian", severity="info", message="the elements' bytes are in big-endian order")


DIAGNOSES: tuple[Diagnosis, ...] = (
    _hostile,
    _unread,
    _copies,
    _part,
    _foreign,
    _discarded,
    _whole_model,
    _prefix,
    _inner_module,
    _stale_versions,
    _devices,
    _nothing,
    _averaged,
    _elsewhere,
    _not_a_model,
    _quantized,
    _ties,
    _order,
    _unused,
    _training,
    _other_weights,
    _outside,
    _byteorder,
)
"""Every diagnosis."""
