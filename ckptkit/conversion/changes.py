"""The changes of a conversion: findings about the output, computed before it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptkit.checkpoint import STATE_DICT, Checkpoint, GlobalUse, Storage, TensorEntry, tied_groups
from ckptkit.computed import ConvertedRange, DTypeConversion
from ckptkit.errors import FormatError
from ckptkit.formats import format_named
from ckptkit.normalize.modules import inner_module_told, wrapper_of
from ckptkit.normalize.quantized import quantization_in, quantized_text
from ckptkit.normalize.sections import brief, step
from ckptkit.normalize.selection import discarded_text, other_parts, other_weights
from ckptkit.normalize.tensors import FoundTensor, other_tensors
from ckptkit.pickling.inert import Global, Object, mapping_items, mapping_shell, walk
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.trust import global_uses, merge_uses, with_places
from ckptkit.plan import LiteralBytes, Plan
from ckptkit.report import Finding, convert_command, count_of, glob_of, human_size, listed, share_of
from ckptkit.shell import quoted

if TYPE_CHECKING:
    from ckptkit.casting import Losses
    from ckptkit.formats.distributed.dcp_names import Flat
    from ckptkit.rewrite.like import Fitting

__all__ = [
    "diagnose_all_tensors",
    "diagnose_beside",
    "diagnose_casts",
    "diagnose_dense",
    "diagnose_fitting",
    "diagnose_flat",
    "diagnose_layout",
    "diagnose_losses",
    "diagnose_moves",
    "diagnose_renames",
    "diagnose_scaled",
    "diagnose_selection",
    "diagnose_trust",
    "diagnose_wrappers",
    "flat_in",
    "gathered_in",
]


def diagnose_renames(
    names: Sequence[str],
    renames: Mapping[str, str],
    *,
    stripped: Collection[str] | None = None,
    ruled: Collection[str] | None = None,
) -> Iterator[Finding]:
    """What renaming came to.

    Args:
        names: before it, those that are kept.
        renames: from old name to new, where they differ.
        stripped: the names that lost a prefix; ``None``: none was to be stripped.
        ruled: the names that a rule changed; ``None``: there were no rules.
    """
    if renames:
        old, new = next(iter(renames.items()))
        yield Finding(
            code="renamed",
            severity="info",
            message=f"{len(renames)} of {count_of(len(names), 'name')} changed, for example {old!r} to {new!r}",
        )
    if ruled is not None and not ruled:
        yield Finding(
            code="nothing-renamed",
            severity="warning",
            message=f"the rules change none of {count_of(len(names), 'name')}",
        )
    if stripped is not None and not stripped:
        yield Finding(
            code="nothing-to-strip",
            severity="info",
            message=f"none of {count_of(len(names), 'name')} has the prefix",
        )
    elif stripped is not None and len(stripped) < len(names):
        kept = next(name for name in names if name not in stripped)
        yield Finding(
            code="mixed-prefix",
            severity="warning",
            message=f"{len(names) - len(stripped)} of {count_of(len(names), 'name')} did not have the prefix, "
            f"such as {kept!r}",
        )


def diagnose_wrappers(
    result: Checkpoint, changed: Collection[str], written: str | None, *, stripped: bool
) -> Iterator[Finding]:
    """What wrappers have left in names that were stripped.

    Args:
        result: as it is written.
        changed: the names that are not those of the source.
        written: where; ``None``: nowhere.
        stripped: whether wrappers or another prefix were removed, which may have hidden some.
    """
    names = list(result.state_dict.everything)
    code, told = "inner-module", inner_module_told(names) if stripped else None
    carrying = [prefix for prefix in map(wrapper_of, changed) if prefix]
    if carrying and not stripped:
        what = f"{share_of(len(carrying), len(names), 'name', 'has', 'have')} a wrapper's prefix (`{carrying[0]}`)"
        code, told = "module-prefix", (f"{what}; --strip-module removes it too", ["--strip-module"])
    if told is not None:
        message, options = told
        if sum(section.is_weights for section in result.sections) > 1 and result.rest is not STATE_DICT:
            options = ["--section", result.origin.state_path or "", *options]
        suffix = ".safetensors" if written is not None and ".safetensors" in written else ".pth"
        fix = convert_command(written, *options, suffix=suffix) if written is not None and told[1] else None
        yield Finding(code=code, severity="warning", message=message, fix=fix)


def diagnose_selection(dropped: Sequence[str], unmatched: Sequence[str]) -> Iterator[Finding]:
    """Which tensors were left out.

    Args:
        dropped: their names.
        unmatched: globs that were to drop something, and match nothing.
    """
    if dropped:
        yield Finding(
            code="dropped",
            severity="info",
            message=f"{count_of(len(dropped), 'tensor')} left out: {listed(dropped, 8, characters=100)}",
        )
    for glob in unmatched:
        yield Finding(code="nothing-excluded", severity="warning", message=f"--exclude {glob!r} matches no name")


def diagnose_dense(made: Mapping[str, str], padded: Collection[str], result: Checkpoint) -> Iterator[Finding]:
    """Which tensors were made dense, and which weights are still packed.

    Args:
        made: each, and what it was made from.
        padded: those that were nested, and have lost the sizes of what was in them.
        result: the output.
    """
    left = quantization_in(result.state_dict)
    if left is not None:
        stay = f"{count_of(left['modules'], 'module', 'stays', 'stay')} quantized"
        told = (
            f"{stay}: {quantized_text(left)}; --densify cannot unpack such weights, but the library that made them can"
        )
        yield Finding(code="densified", severity="warning", message=told)
        if not made:
            return
    if not made:
        yield Finding(
            code="densified", severity="info", message="no value is sparse, nested, quantized or scaled by blocks"
        )
        return
    shown = [f"{name} ({of})" for name, of in made.items()]
    yield Finding(
        code="densified",
        severity="info",
        message=f"{count_of(len(made), 'tensor', 'was', 'were')} made dense: {listed(shown, 8, characters=100)}",
    )
    if padded:
        yield Finding(
            code="densified",
            severity="warning",
            message=f"{count_of(len(padded), 'nested tensor', 'is', 'are')} padded with zeros, and the sizes of the "
            f"tensors inside are not in the output: {listed(sorted(padded), 8, characters=100)}",
        )


def diagnose_fitting(fitting: Fitting, label: str, source: Checkpoint) -> Iterator[Finding]:
    """Where the tensors of a model were found.

    Args:
        fitting: of the weights as the options left them.
        label: the model.
        source: the checkpoint as it was read.
    """
    count = len(fitting.sources) + len(fitting.aliases) + len(fitting.counters)
    section = f" in section {source.origin.state_path!r}" if source.origin.state_path else ""
    changed = f", {'; '.join(fitting.causes)}" if fitting.causes else ""
    message = f"all {count_of(count, 'tensor')} of {label} are present{section}{changed}"
    if fitting.aliases:
        pairs = [f"{name} = {twin}" for name, twin in fitting.aliases.items()]
        message += f"; tied to one that is present: {listed(pairs, 8, characters=100)}"
    if fitting.counters:
        message += f"; counters that torch sets when it loads: {listed(fitting.counters, 8, characters=100)}"
    yield Finding(code="like-reference", severity="info", message=message)


def diagnose_moves(unmet: Sequence[str], met: Collection[str]) -> Iterator[Finding]:
    """Which locations were to be mapped, and nothing is there.

    Args:
        unmet: those.
        met: where tensors are.
    """
    for location in unmet:
        yield Finding(
            code="nothing-moved",
            severity="warning",
            message=f"--map-location {location}=…: nothing in the file is on {location!r}; "
            f"it has {listed(sorted(met), 8, characters=100) or 'no storage'}",
        )


def diagnose_scaled(scaled: Mapping[str, str]) -> Iterator[Finding]:
    """Which weights were cast without the scales they belong to, or which scales, because that was insisted on."""
    if scaled:
        pairs = listed([f"{name} (with {other})" for name, other in scaled.items()], 8, characters=100)
        have = "is cast that has" if len(scaled) == 1 else "are cast that have"
        told = f"{count_of(len(scaled), 'tensor')} {have} meaning only together with another: {pairs}"
        yield Finding(code="cast-scaled", severity="warning", message=told)


def diagnose_losses(
    source: Checkpoint,
    result: Checkpoint,
    plan: Plan,
    *,
    leave_out: Collection[str] = (),
    beside: Checkpoint | None = None,
) -> Iterator[Finding]:
    """Values that are not in the output.

    Args:
        source: the checkpoint as it was read.
        result: as it is written.
        plan: of the output.
        leave_out: paths of parts that were to be left out.
        beside: the checkpoint without the values that are in the metadata; ``None``: none are.
    """
    if source.origin.is_program:
        pairs = mapping_items(source.rest) or []
        left_out = [step(key) for key, value in pairs if value is not STATE_DICT]
        yield from (finding for finding in source.findings if finding.code == "extra-files")
    else:
        kept = set(other_parts(result))
        left_out = [key for key in other_parts(source if beside is None else beside) if key not in kept]
    if source.discarded:  # what would keep them is refused
        left_out.append(discarded_text(source.discarded))
    if left_out:
        yield Finding(
            code="left-out", severity="info", message=f"not in the output: {listed(left_out, 8, characters=100)}"
        )
    if source.state_dict.is_module and not result.state_dict.is_module:
        cls = getattr(source.module, "class_name", "?")
        under = f" under {source.origin.state_path!r:.200}" if source.origin.state_path else ""
        yield Finding(
            code="module-left-out",
            severity="info",
            message=f"the model{under} is written as its state_dict: its class {cls:.200} and its settings are not in "
            "the output",
        )
    lost = [] if source.origin.is_program else _lost(source, result, plan)
    kinds = {each.path: "a model" if each.kind == "whole_model" else "a state_dict" for each in source.sections}
    for path, inside in other_weights(source, lost).items():
        if path not in leave_out:
            yield Finding(
                code="weights-left-out",
                severity="warning",
                message=f"{path!r:.200}, {kinds[path]} of {count_of(len(inside), 'tensor')}, is not in the output: "
                "it also contains weights, under other names",
                fix=f"--section {quoted(path)}",
            )
    outside = [f"{found.path:.100} ({brief(found.node)})" for found in lost if found.section is None]
    if outside:
        yield Finding(
            code="attributes-left-out",
            severity="warning",
            message=f"{count_of(len(outside), 'tensor')} in attributes or objects not in the output: "
            + listed(outside, 8),
        )


def diagnose_all_tensors(everything: Checkpoint, tensorless: Collection[str]) -> Iterator[Finding]:
    """That the tensors have the names of their places, and what else there was.

    Args:
        everything: the checkpoint with all of its tensors for its weights.
        tensorless: what holds none.
    """
    count = count_of(len(everything.state_dict.everything), "tensor")
    beside = f" ({listed(tensorless, 8, characters=100)})" if tensorless else ""
    told = f"{count} named by the keys that lead to each; nothing else is in the output{beside}"
    yield Finding(code="all-tensors", severity="info", message=told)


def diagnose_beside(
    kept: Collection[str], left: Mapping[str, str], plain: Sequence[str], text: str | None
) -> Iterator[Finding]:
    """Which plain values beside the weights, or among them, are in the output.

    Args:
        kept: values that were to be kept and are.
        left: values that were to be kept and are not plain, with their content.
        plain: names of the plain values of the state_dict that are not in the output.
        text: their text in the metadata.
    """
    if kept:
        where = "in their places" if text is None else f"in the metadata, {human_size(len(text))} of text"
        told = f"kept {where}: {listed(kept, 8, characters=100)}"
        yield Finding(code="kept-beside", severity="info", message=told)
    if left:
        parts = [f"{part:.100} ({why})" for part, why in left.items()]
        yield Finding(
            code="not-kept",
            severity="warning",
            message=f"{count_of(len(parts), 'part', 'is', 'are')} not plain values and not kept: "
            + listed(parts, 8, characters=160),
        )
    if plain:
        yield Finding(
            code="plain-values",
            severity="info",
            message=f"{count_of(len(plain), 'plain value')} of the state_dict {'is' if len(plain) == 1 else 'are'} not "
            f"in the output, which stores only tensors: {listed(plain, 8, characters=100)}",
            fix="--keep-beside",
        )


def _lost(source: Checkpoint, result: Checkpoint, plan: Plan) -> list[FoundTensor]:
    """The tensors, beside the plain ones of the state_dict, and the arrays that the output does not hold."""
    beside = other_tensors(source)
    if not beside:
        return []
    alone = result.rest is STATE_DICT and not result.state_dict.is_module
    # A storage that was moved, cut or cast keeps the key of the one it was.
    written = [] if format_named(plan.format).tensors_alone else _beside_plain(result)
    keys = {(node.original or node).key for node in map(_storage, walk(written)) if node is not None}
    spans: dict[str, list[tuple[int, int]]] = {}
    for entry in source.state_dict.values():
        spans.setdefault(entry.storage.key, []).append(entry.span())

    def is_kept(node: TensorEntry | Storage | Object) -> bool:
        storage = _storage(node)
        if storage is None:  # an array
            return not alone
        start, end = node.span() if isinstance(node, TensorEntry) else (0, storage.nbytes)
        within = any(first <= start and end <= last for first, last in spans.get(storage.key, ()))
        return within or storage.key in keys

    others = [found for found in beside if found.section is None or found.section != source.origin.state_path]
    return [found for found in others if not is_kept(found.node)]


def _beside_plain(result: Checkpoint) -> list[object]:
    """The part of a pickle beside the plain tensors of the state_dict, as `lower_state_dict` writes it."""
    state_dict = result.state_dict
    if state_dict.is_module:
        return [state_dict.container, result.rest]
    written = [node for node in state_dict.values() if state_dict.container is not None or node.subclass is not None]
    hanging = [part for node in written for part in (node.subclass, node.attributes, node.effects)]
    return [*state_dict.extra.values(), hanging, mapping_shell(state_dict.container), result.rest]


def _storage(node: object) -> Storage | None:
    """The storage that a node is, or views."""
    return node.storage if isinstance(node, TensorEntry) else node if isinstance(node, Storage) else None


def diagnose_trust(source: Checkpoint, result: Checkpoint, plan: Plan) -> Iterator[Finding]:
    """Whether a pickle that is written names what runs, imports or opens.

    Args:
        source: the checkpoint as it was read.
        result: as it is written.
        plan: of the output; its pickles are read as those of any file.
    """
    if source.trust != "hostile":
        return
    hostile: list[GlobalUse] = []
    for made in plan.all_steps():
        if isinstance(made, LiteralBytes) and not made.data.startswith(b"PK"):
            try:
                pickle = read_pickle(made.data, whole=True)
            except FormatError:  # a header, an index
                continue
            uses = with_places(global_uses(pickle.globals), pickle.root)
            hostile.extend(use for use in uses if use.verdict == "dangerous")
    if not hostile:
        return
    names = {use.name for use in hostile}
    inside = [name for name, value in result.state_dict.extra.items() if _names_any(value, names)]
    options = [f"--exclude {glob_of(name)}" for name in inside[:8]]
    if not inside or _names_any(result.rest, names):
        options.append("--weights-only" if result.state_dict.everything else "--to safetensors")
    told = (use.name + _in(use) for use in merge_uses(hostile))
    yield Finding(
        code="hostile-output",
        severity="warning",
        message="the output is as hostile as the source: its pickle names "
        f"{listed(told, 8, characters=100)}; loading it with pickle runs that",
        fix=" ".join(options),
    )


def _in(use: GlobalUse) -> str:
    return f" (in {use.where[0]!r:.80})" if use.where else ""


def _names_any(value: object, names: Collection[str]) -> bool:
    return any(isinstance(node, Global) and node.qualified in names for node in walk(value))


def diagnose_layout(
    result: Checkpoint, plan: Plan, dead: tuple[int, int], flat: Mapping[str, TensorEntry] | None = None
) -> Iterator[Finding]:
    """Values that have another form in the output.

    Args:
        result: the checkpoint as it is written.
        plan: of the output.
        dead: storages that were cut, and the bytes that no tensor viewed of them.
        flat: every tensor, where each has its own bytes in a folder; ``None``: a file is written.
    """
    storages, nbytes = dead
    each_apart = format_named(plan.format).tensors_alone or flat is not None
    if nbytes and not each_apart:
        told = f"{human_size(nbytes)} in {count_of(storages, 'storage')} belong to no tensor and are left out"
        yield Finding(code="compacted", severity="info", message=told)
    if not each_apart:
        return
    entries = result.state_dict if flat is None else flat
    stored = [entry for name, entry in entries.items() if name not in plan.aliases and entry.nbytes]
    gathered = Counter(entry.form for entry in stored if not entry.is_plain_bytes)
    overlapping = len(stored) - len({id(entry.storage) for entry in stored})
    if gathered or overlapping:
        yield Finding(
            code="written-out",
            severity="info",
            message=" and ".join(
                [f"{count_of(n, 'tensor', 'was', 'were')} {how}" for how, n in gathered.items()]
                + [f"{count_of(overlapping, 'tensor')} shared a storage"] * bool(overlapping)
            )
            + "; each has its own bytes in the output",
        )


def flat_in(plan: Plan, result: Checkpoint) -> Flat | None:
    """The names in a folder that is written; ``None``: a file is."""
    if plan.in_folder is None:
        return None
    from ckptkit.formats.distributed.dcp_names import flattened

    return flattened(result)


def gathered_in(entries: Mapping[str, TensorEntry]) -> list[str]:
    """The tensors whose elements are not stored in the order in which they are written."""
    return [name for name, entry in entries.items() if entry.nbytes and not entry.is_plain_bytes]


def diagnose_flat(flat: Flat) -> Iterator[Finding]:
    """The part of a tree that a torch.distributed.checkpoint folder does not keep."""
    ties = [listed(names, 4, between=" = ", characters=100) for names in tied_groups(flat.tensors)]
    if ties:
        told = f"{count_of(len(ties), 'tensor')} with several names, which are no longer tied: {listed(ties, 4)}"
        yield Finding(code="untied", severity="info", message=told)
    if flat.lost:
        told = f"stored differently from the source, as torch.distributed.checkpoint also does: {listed(flat.lost, 8)}"
        yield Finding(code="flattened", severity="info", message=told)


def diagnose_casts(result: Checkpoint, tally: Iterable[tuple[DTypeConversion, Losses]]) -> Iterator[Finding]:
    """What casting lost.

    Args:
        result: the checkpoint as it was written.
        tally: each conversion that was carried out, and what it lost.
    """
    names: dict[int, str] = {}
    for name, entry in result.state_dict.items():
        if isinstance(entry.storage.source, ConvertedRange):
            names.setdefault(id(entry.storage.source.whole), name)
    lost = [(names.get(id(conversion), conversion.name), losses) for conversion, losses in tally]
    values = sum(losses.values for _, losses in lost)
    overflowed = [(name, losses.overflowed) for name, losses in lost if losses.overflowed]
    if overflowed:
        yield Finding(
            code="cast-overflow",
            severity="warning",
            message=f"{share_of(sum(n for _, n in overflowed), values, 'value', 'is', 'are')} too large for the new "
            f"dtype: {listed([f'{name} ({n:,})' for name, n in overflowed], 8, characters=100)}",
            fix=f"--keep-dtype {glob_of(overflowed[0][0])}",
        )
    rounded, vanished = sum(losses.rounded for _, losses in lost), sum(losses.underflowed for _, losses in lost)
    if rounded:
        yield Finding(
            code="cast-rounded",
            severity="info",
            message=f"{share_of(rounded, values, 'value', 'was', 'were')} rounded to the new dtype"
            + (f", {vanished:,} of them to zero" if vanished else ""),
        )
