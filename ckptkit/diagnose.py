"""What is remarkable about a checkpoint: findings, each with the command that mends it.

Computed from the common representation alone: no tensor byte is read, nothing is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ckptkit.checkpoint import STATE_DICT, Checkpoint, Storage, TensorEntry, shared_storages
from ckptkit.pickling.inert import Global, children, mapping_items, walk
from ckptkit.plan import Gather, Plan
from ckptkit.report import Finding, convert_command, human_size
from ckptkit.rewrite.prefix import unwrapped
from ckptkit.sections import is_plain, step

__all__ = ["DIAGNOSES", "Contents", "diagnose", "diagnose_losses", "diagnose_renames"]


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything in a checkpoint that has bytes, found in one walk.

    Attributes:
        entries: every tensor, in the state_dict, its extra values and what else there is; by ``id``.
        bare: every storage that stands in the tree by itself, by ``id``.
        storages: these, and those of the tensors, by ``id``.
    """

    entries: dict[int, TensorEntry]
    bare: dict[int, Storage]
    storages: dict[int, Storage]


Diagnosis = Callable[[Checkpoint, Contents], Iterator[Finding]]

_NOTABLE_UNUSED = 1 << 10
"""Bytes below which an oversized storage is not worth a line."""


def diagnose(checkpoint: Checkpoint) -> tuple[Finding, ...]:
    """The reader's findings and every diagnosis, gravest first."""
    contents = _contents(checkpoint)
    found = [*checkpoint.findings, *(finding for check in DIAGNOSES for finding in check(checkpoint, contents))]
    order = {"error": 0, "warning": 1, "info": 2}
    return tuple(sorted(found, key=lambda finding: order[finding.severity]))


def _hostile(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    for use in checkpoint.globals:
        if use.verdict == "dangerous":
            yield Finding(
                code="hostile-name",
                severity="error",
                message=f"the pickle names {use.name}: a loader that executes it would run that",
            )


def _foreign(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    names = [use.name for use in checkpoint.globals if use.verdict == "unknown"]
    if not names or checkpoint.module is not None:
        return
    places = _places(checkpoint.rest)
    shown = ", ".join(name + (f" in {places[name]!r}" if places.get(name) else "") for name in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    yield Finding(
        code="foreign-objects",
        severity="warning",
        message=f"objects that torch.load refuses by default: {shown}{more}; never executed here",
        fix=convert_command(checkpoint.origin.path, "--weights-only") if checkpoint.state_dict else None,
    )


def _places(root: object) -> dict[str, str]:
    """For each name in the tree, the first key of the root under which it occurs."""
    places: dict[str, str] = {}
    seen: set[int] = set()  # of all keys together: what they share is gone through once
    for key, value in mapping_items(root) or []:
        stack = [value]
        while stack:
            node = stack.pop()
            if isinstance(node, (str, int, float, bytes, type(None))) or id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, Global):
                places.setdefault(node.qualified, step(key))
            stack.extend(children(node))
    return places


def _whole_model(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    if checkpoint.module is None or any(finding.code == "bound-method" for finding in checkpoint.findings):
        return
    cls = getattr(checkpoint.module, "class_name", "?")
    yield Finding(
        code="whole-model",
        severity="warning",
        message=f"a pickled model of class {cls}: torch.load needs its code; the weights are read here without it",
        fix=convert_command(checkpoint.origin.path),
    )


def _prefix(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    names = list(checkpoint.state_dict.everything)
    carrying = sum(unwrapped(name) != name for name in names)
    if not carrying or any(finding.code == "wrapped-model" for finding in checkpoint.findings):
        return
    wrapper = next(name for name in names if unwrapped(name) != name)
    prefix = "module." if wrapper.startswith("module.") else "_orig_mod."
    yield Finding(
        code="module-prefix",
        severity="warning",
        message=f"{carrying} of {len(names)} names carry a wrapper's prefix (`{prefix}`) that the bare model lacks",
        fix=convert_command(checkpoint.origin.path, "--strip-module"),
    )


def _devices(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    places = Counter(storage.location for storage in contents.storages.values())
    places.pop("cpu", None)
    if places:
        shown = ", ".join(f"{location} ({count})" for location, count in sorted(places.items()))
        yield Finding(
            code="device-location",
            severity="warning",
            message=f"storages tagged {shown}: a plain torch.load fails on a machine without these devices",
            fix=convert_command(checkpoint.origin.path, "--map-location", "cpu", suffix=".pth"),
        )


def _ties(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    tied: dict[tuple[object, ...], list[str]] = {}
    views: Counter[int] = Counter()
    several = shared_storages(checkpoint.state_dict.values())
    for name, entry in checkpoint.state_dict.items():
        if id(entry.storage) in several and entry.nbytes:
            names = tied.setdefault(entry.view, [])
            views[id(entry.storage)] += not names
            names.append(name)
    groups = [names for names in tied.values() if len(names) > 1]
    if groups:
        shown = "; ".join(" = ".join(names[:3]) for names in groups[:3])
        yield Finding(
            code="tied-tensors",
            severity="info",
            message=f"{len(groups)} tensors stand under several names: {shown}" + ("; ..." if len(groups) > 3 else ""),
        )
    shared = sum(count for count in views.values() if count > 1)
    if shared:
        yield Finding(
            code="shared-storage",
            severity="info",
            message=f"{shared} tensors are different views of storages they share",
        )


def _unused(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    extents: dict[int, list[tuple[int, int]]] = {}
    for entry in contents.entries.values():
        extents.setdefault(id(entry.storage), []).append(entry.span())
    unused = 0
    for key, storage in contents.storages.items():
        if key in contents.bare:
            continue
        covered = end = 0
        for start, stop in sorted(extents[key]):
            covered += max(0, stop - max(start, end))
            end = max(end, stop)
        unused += storage.nbytes - covered
    if unused >= _NOTABLE_UNUSED:
        yield Finding(
            code="unused-bytes",
            severity="info",
            message=f"{human_size(unused)} of the file belong to storages but to no tensor: views of larger tensors",
            fix=convert_command(checkpoint.origin.path) if checkpoint.state_dict else None,
        )


def _training(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    if checkpoint.origin.kind != "resume" or not checkpoint.state_dict:
        return
    weights = {id(entry.storage): entry.storage.nbytes for entry in checkpoint.state_dict.values()}
    everything = sum(storage.nbytes for storage in contents.storages.values())
    beside = everything - sum(weights.values())
    if beside > 0:
        yield Finding(
            code="training-state",
            severity="info",
            message=f"{human_size(beside)} ({beside / max(checkpoint.origin.size, 1):.0%} of the file) are not weights",
            fix=convert_command(checkpoint.origin.path, "--weights-only"),
        )


def _nothing(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    if checkpoint.origin.kind == "other":
        yield Finding(code="no-tensors", severity="warning", message="the file holds no tensor at all")


def _byteorder(checkpoint: Checkpoint, contents: Contents) -> Iterator[Finding]:
    if checkpoint.origin.byteorder == "big":
        yield Finding(code="big-endian", severity="info", message="the elements' bytes are in big-endian order")


DIAGNOSES: tuple[Diagnosis, ...] = (
    _hostile,
    _foreign,
    _whole_model,
    _prefix,
    _devices,
    _nothing,
    _ties,
    _unused,
    _training,
    _byteorder,
)
"""Every diagnosis."""


def _contents(checkpoint: Checkpoint) -> Contents:
    values = checkpoint.state_dict.everything.values()
    entries = {id(value): value for value in values if isinstance(value, TensorEntry)}
    bare: dict[int, Storage] = {}
    for node in walk([*(value for value in values if not is_plain(value)), checkpoint.rest]):
        if isinstance(node, TensorEntry):
            entries[id(node)] = node
        elif isinstance(node, Storage):
            bare[id(node)] = node
    storages = {id(entry.storage): entry.storage for entry in entries.values()}
    return Contents(entries, bare, {**storages, **bare})


# What a conversion changes.


def diagnose_renames(source: Checkpoint, renames: Mapping[str, str], *, strip: bool) -> Iterator[Finding]:
    """What renaming came to.

    Args:
        source: the checkpoint before it.
        renames: from old name to new, where they differ.
        strip: whether a prefix was to be stripped.
    """
    names = list(source.state_dict.everything)
    if renames:
        old, new = next(iter(renames.items()))
        yield Finding(
            code="renamed",
            severity="info",
            message=f"{len(renames)} of {len(names)} names changed, as {old!r} to {new!r}",
        )
    if strip and not renames:
        yield Finding(
            code="nothing-to-strip", severity="info", message=f"none of {len(names)} names carries the prefix"
        )
    elif strip and len(renames) < len(names):
        kept = next(name for name in names if name not in renames)
        yield Finding(
            code="mixed-prefix",
            severity="warning",
            message=f"{len(names) - len(renames)} of {len(names)} names did not carry the prefix, such as {kept!r}",
        )


def diagnose_losses(source: Checkpoint, result: Checkpoint, plan: Plan) -> Iterator[Finding]:
    """What the output does not hold, or holds in another form.

    Args:
        source: the checkpoint as it was read.
        result: as it is written.
        plan: of the output.
    """
    asked_for = result.rest is STATE_DICT
    left_out: list[str] = []
    if asked_for or plan.format == "safetensors":
        pairs = mapping_items(source.rest) or []
        left_out = [step(key) for key, value in pairs if value is not STATE_DICT]
    if left_out:
        more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        yield Finding(
            code="left-out",
            severity="info" if asked_for else "warning",
            message=f"not in the output: {', '.join(left_out[:8])}{more}",
            fix=None if asked_for else "write a .pth to keep them",
        )
    if plan.format != "safetensors":
        return
    gathered = sum(isinstance(made, Gather) for made in plan.steps)
    stored = [entry for name, entry in result.state_dict.items() if name not in plan.aliases and entry.nbytes]
    overlapping = len(stored) - len({id(entry.storage) for entry in stored})
    if gathered or overlapping:
        yield Finding(
            code="written-out",
            severity="info",
            message=f"{gathered} tensors were not contiguous and {overlapping} shared a storage; "
            "each has its own bytes in the output",
        )
