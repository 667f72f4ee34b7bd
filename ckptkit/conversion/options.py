"""Runs ``convert``: options become rewriters, in a fixed order, and their results are reported.

Chooses the weights in a file that are those of a model: each section is tried as if it had been selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from ckptkit import rewrite  # each rewriter is imported when it is used
from ckptkit.bytesource import Source
from ckptkit.checkpoint import STATE_DICT, Checkpoint, TensorEntry
from ckptkit.computed import ConvertedRange
from ckptkit.conversion.changes import (
    diagnose_all_tensors,
    diagnose_beside,
    diagnose_casts,
    diagnose_dense,
    diagnose_fitting,
    diagnose_flat,
    diagnose_layout,
    diagnose_losses,
    diagnose_moves,
    diagnose_renames,
    diagnose_scaled,
    diagnose_selection,
    diagnose_trust,
    diagnose_wrappers,
    flat_in,
    gathered_in,
)
from ckptkit.errors import CkptkitError, CorruptError, RewriteError, SectionError
from ckptkit.formats import read, reread
from ckptkit.normalize.modules import unwrapped_path
from ckptkit.normalize.nested import NestedDicts
from ckptkit.normalize.parts import part_findings, require_whole, way_findings
from ckptkit.normalize.plain_json import plain_extra
from ckptkit.normalize.sections import above_tensors, step
from ckptkit.normalize.selection import BESIDE, other_parts, paths_listed, weights_paths
from ckptkit.normalize.tensors import other_tensors
from ckptkit.pickling.arrays import is_array, layout_of
from ckptkit.pickling.inert import mapping_items
from ckptkit.plan import Gather, Plan
from ckptkit.report import Finding, listed
from ckptkit.rewrite.beside import restored as values_restored
from ckptkit.rewrite.beside import without_plain_values
from ckptkit.rewrite.dtype import scaled_pairs
from ckptkit.rewrite.like import Fitting
from ckptkit.rewrite.storages import dead_bytes
from ckptkit.shell import command_line

if TYPE_CHECKING:
    from ckptkit.documents import CastDocument, ChangesDocument
    from ckptkit.options import ConvertOptions
    from ckptkit.rewrite.like import Like
    from ckptkit.transfer.steps import Tally

    Renamer = rewrite.StripModule | rewrite.AddModule | rewrite.StripPrefix | rewrite.AddPrefix | rewrite.Rename

__all__ = [
    "Conversion",
    "like_checkpoint",
    "needs_weights",
    "read_others",
    "read_section",
    "section_like",
    "unselected_weights",
    "with_flat_cut",
]


def renamers_of(options: ConvertOptions) -> tuple[Renamer, ...]:
    """The rewriters of names that options ask for, in order."""
    found: list[Renamer] = []
    if options.strip_module:
        found.append(rewrite.StripModule())
    if options.add_module:
        found.append(rewrite.AddModule())
    if options.strip_prefix is not None:
        # A prefix may hide wrappers (`model._orig_mod.module.x`), and be given with them or without.
        uncovers = options.strip_module and not options.add_module and bool(options.strip_prefix.strip("."))
        prefix = unwrapped_path(options.strip_prefix.rstrip(".")) if uncovers else options.strip_prefix
        if prefix or not uncovers:
            found.append(rewrite.StripPrefix(prefix))
        if uncovers:
            found.append(rewrite.StripModule())
    if options.add_prefix is not None:
        found.append(rewrite.AddPrefix(options.add_prefix))
    if options.rename:
        found.append(rewrite.Rename(options.rename))
    return tuple(found)


def needs_weights(options: ConvertOptions) -> bool:
    """Whether options make no sense without a state_dict."""
    others = options.include or options.exclude or options.weights_only or options.dtype or options.densify
    return bool(renamers_of(options) or others or options.like is not None or options.as_key is not None)


def _described(result: Checkpoint, metadata: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with these strings in its metadata.

    Raises:
        RewriteError: they would replace the plain values that are kept there.
    """
    if BESIDE in metadata and BESIDE in result.metadata:
        raise RewriteError(f"--metadata {BESIDE}: that key is reserved for the plain values that are kept")
    return result.replace(metadata={**result.metadata, **metadata})


def tensorless_parts(checkpoint: Checkpoint) -> list[str]:
    """Values that are not tensors: keys of the file's dict or list, names in its state_dict, arrays of other types."""
    rest = checkpoint.rest
    pairs = mapping_items(rest) or (list(enumerate(rest)) if isinstance(rest, (list, tuple)) else [])
    pairs = [*pairs, *checkpoint.state_dict.extra.items()]
    holding = above_tensors([value for _, value in pairs])
    arrays = (found for found in other_tensors(checkpoint) if is_array(found.node))
    found = [
        *(step(key) for key, value in pairs if value is not STATE_DICT and id(value) not in holding),
        *(each.path for each in arrays if layout_of(each.node).dtype is None),  # type: ignore[arg-type]
    ]
    return list(dict.fromkeys(found))


def as_named(checkpoint: Checkpoint, options: ConvertOptions) -> Checkpoint:
    """The weights that options ask for, under the names that they ask for.

    Raises:
        RewriteError: they do not apply to it.
    """
    renamers = renamers_of(options)
    select = rewrite.Select(options.include, options.exclude, rename=_in_turn(renamers))
    dense = [rewrite.Densify(beside=checkpoint.state_dict)] if options.densify else []
    return checkpoint.rewrite(rewrite.WeightsOnly(), select, *dense, *renamers)


def with_flat_cut(checkpoint: Checkpoint, options: ConvertOptions) -> Checkpoint:
    """The checkpoint with flat parameters split by ``options.like``, if both exist.

    Raises:
        RewriteError: they are not the model's.
    """
    return checkpoint if options.like is None else options.like.cut(checkpoint, _in_turn(renamers_of(options)))


def _in_turn(renamers: Sequence[Renamer]) -> Callable[[str], str]:
    """From a name to what rewriters of names make of it."""

    def renamed(name: str) -> str:
        for renamer in renamers:
            name = renamer.rename(name)
        return name

    return renamed


class Conversion:
    """A checkpoint before and after.

    Args:
        source: the checkpoint as it was read.
        options: what to do to it.
        tensors_alone: whether the output contains only tensors and strings.
        weights_alone: whether it contains only a state_dict.
        restored: whether values from its metadata were brought back to their places, to keep them.

    Attributes:
        source: that.
        result: to write.
        renames: each name that changed, and its new one.
        dropped: the names that were left out.
        fitting: how the weights fit the model they must match; ``None``: no model was given.

    Raises:
        RewriteError: an option cannot be applied.
    """

    def __init__(
        self,
        source: Checkpoint,
        options: ConvertOptions,
        *,
        tensors_alone: bool = False,
        weights_alone: bool = False,
        restored: bool = False,
    ) -> None:
        self._options = options
        # First the parts beside the weights, because an optimizer prevents dropping parameters.
        result = source.rewrite(rewrite.LeaveOut(options.leave_out)) if options.leave_out else source
        self._tensorless: list[str] = []
        if options.all_tensors:
            self._tensorless = tensorless_parts(result)
            source = result = result.rewrite(rewrite.AllTensors())
        self.source = source
        renamers = renamers_of(options)
        rename = _in_turn(renamers)
        self._like = options.like
        self.fitting = None if self._like is None else self._like.fitting(as_named(source, options))
        fitted = {} if self.fitting is None else {old: new for new, old in self.fitting.sources.items()}

        def final(name: str) -> str:
            renamed = rename(name)
            return fitted.get(renamed, renamed)

        self._is_restored, self._tensors_alone, self._weights_alone = restored, tensors_alone, weights_alone
        self._beside: Checkpoint | None = None
        self._kept_beside: list[str] = []
        self._not_kept: dict[str, str] = {}
        if options.weights_only:
            result = self._weights_only(result)
        self._unmatched: tuple[str, ...] = ()
        if options.include or options.exclude:
            select = rewrite.Select(options.include, options.exclude, rename=rename)
            self._unmatched = select.unmatched(source)
            result = result.rewrite(select)
        self._dense = rewrite.Densify(beside=source.state_dict) if options.densify else None
        taken = frozenset[str]()
        if self._dense is not None:
            result = result.rewrite(self._dense)
            taken = frozenset(self._dense.taken)
        kept = {name: None for name in result.state_dict.everything if not fitted or rename(name) in fitted}
        self._kept = list(kept)
        self.dropped = [name for name in source.state_dict.everything if name not in kept and name not in taken]
        self._scaled: dict[str, str] = {}
        if options.dtype is not None:
            result = self._cast(result, final, taken)
        result = result.rewrite(*renamers, *(() if self._like is None else (self._like,)))
        self.renames = {name: new for name in kept if (new := final(name)) != name}
        self._moves: rewrite.MapLocation | None = None
        if options.map_location is not None:
            self._moves = rewrite.MapLocation(options.map_location)
            result = result.rewrite(self._moves)
        if options.tied != "alias":
            result = result.rewrite(rewrite.Tied(options.tied))
        self._put: str | None = None
        self._plain: list[str] = []
        result = self._placed(result)
        self._dead = dead_bytes(result)
        if self._dead[1]:
            result = result.rewrite(rewrite.Compact())
        if options.metadata:
            result = _described(result, options.metadata)
        self.result = result

    def _weights_only(self, result: Checkpoint) -> Checkpoint:
        if self._options.keep_beside:
            result = self._keep_beside(result, among=False)
        result = result.rewrite(rewrite.WeightsOnly())
        return values_restored(result) if self._beside is not None and not self._weights_alone else result

    def _placed(self, result: Checkpoint) -> Checkpoint:
        """The weights in their new place, with everything beside and among them that can be kept."""
        options = self._options
        if options.as_key is not None:
            if self._weights_alone:
                raise RewriteError("--as puts the weights under a key of a .pth; this output contains only the weights")
            put = rewrite.PutUnder(options.as_key)
            self._put = put.replaced(result)
            result = result.rewrite(put)
        if self._weights_alone and (options.keep_beside or (self._is_restored and not options.weights_only)):
            result = self._keep_beside(result, among=self._tensors_alone)
        if self._tensors_alone and self.source.module is None:  # what a module keeps as a number is a tensor in its own
            self._plain = plain_extra(result.state_dict)
            result = result.rewrite(without_plain_values) if self._plain else result
        return result

    def _keep_beside(self, checkpoint: Checkpoint, *, among: bool) -> Checkpoint:
        keep = rewrite.KeepBeside(among)
        kept, left = keep.kept_of(checkpoint)
        self._kept_beside += kept
        self._not_kept.update(left)
        if keep(checkpoint) is not checkpoint:
            checkpoint = checkpoint.rewrite(keep)
            self._beside = self._beside or checkpoint
        return checkpoint

    def _cast(self, result: Checkpoint, final: Callable[[str], str], taken: frozenset[str]) -> Checkpoint:
        """The checkpoint with its weights cast; ``taken`` are names whose values are others by now."""
        options = self._options
        pairs = scaled_pairs(self.source.state_dict)  # scales that are left out were scales all the same
        cast = rewrite.CastDtype(
            options.dtype or "",
            options.keep_dtype,
            rename=final,
            cast_scaled=options.cast_scaled,
            scaled={name: of for name, of in pairs.items() if taken.isdisjoint((name, of))},
        )
        if unmatched := cast.unmatched(result):
            raise RewriteError(f"--keep-dtype {unmatched[0]!r} matches no name")
        self._scaled = cast.scaled_in(result) if options.cast_scaled else {}
        return result.rewrite(cast)

    def findings(self, plan: Plan, written: str | None = None) -> Iterator[Finding]:
        """Findings that are known before anything is written.

        Args:
            plan: of the output.
            written: where that will be; ``None``: it is not going to be written.
        """
        yield from part_findings(self.source)
        yield from way_findings(self.source)
        strips = self._options.strip_module or self._options.strip_prefix is not None
        stripped = self._changed_by(rewrite.StripModule, rewrite.StripPrefix) if strips else None
        ruled = self._changed_by(rewrite.Rename) if self._options.rename else None
        yield from diagnose_renames(self._kept, self.renames, stripped=stripped, ruled=ruled)
        if strips and not self._options.add_module:
            changed = self.renames.values()
            yield from diagnose_wrappers(self.result, changed, written, stripped=self._options.strip_module)
        if self.fitting is not None and self._like is not None:
            yield from diagnose_fitting(self.fitting, self._like.label, self.source)
        yield from diagnose_selection(self.dropped, self._unmatched)
        if self._dense is not None:
            yield from diagnose_dense(self._dense.made, self._dense.padded, self.result)
        yield from diagnose_scaled(self._scaled)
        if self._moves is not None:
            yield from diagnose_moves(self._moves.unmet, self._moves.met)
        container = self.result.state_dict.container
        if isinstance(container, NestedDicts) and container.filled(self.result.state_dict.everything) is None:
            told = "the nested dicts become one flat dict with dotted names, because names were changed or left out"
            yield Finding(code="nested-names", severity="info", message=told)
        leave_out, beside = self._options.leave_out, self._beside
        yield from diagnose_losses(self.source, self.result, plan, leave_out=leave_out, beside=beside)
        kept, text = self._kept_beside, self.result.metadata.get(BESIDE, "")
        if self._is_restored and not self._weights_alone:
            kept = [key for key in [*other_parts(self.result), *self.result.state_dict.extra] if key not in kept] + kept
        yield from diagnose_beside(kept, self._not_kept, self._plain, text if self._weights_alone else None)
        if self._options.all_tensors:
            yield from diagnose_all_tensors(self.source, self._tensorless)
        if self._put is not None:
            place = f"the weights are under {self._options.as_key!r:.200}"
            told = f"{place}; the previous value there is not in the output: {self._put}"
            yield Finding(code="replaced", severity="info", message=told)
        yield from diagnose_trust(self.source, self.result, plan)
        flat = flat_in(plan, self.result)
        yield from diagnose_layout(self.result, plan, self._dead, None if flat is None else flat.tensors)
        if flat is not None:
            yield from diagnose_flat(flat)

    def _changed_by(self, *kinds: type[Renamer]) -> set[str]:
        """The names that renamers of these kinds change."""
        renamers = renamers_of(self._options)
        changed = set()
        for name in self._kept:
            now = name
            for renamer in renamers:
                before, now = now, renamer.rename(now)
                if before != now and isinstance(renamer, kinds):
                    changed.add(name)
        return changed

    def losses(self, tally: Tally) -> Iterator[Finding]:
        """What casts lost, once it is written."""
        yield from diagnose_casts(self.result, tally)

    def details(self, plan: Plan) -> ChangesDocument:
        """The changes, for JSON documents."""
        entries, like = self.result.state_dict, self._like
        casts: list[CastDocument] = []
        for name, entry in entries.items():
            source = entry.storage.source
            if isinstance(source, ConvertedRange):
                casts.append({"name": name, "from": source.whole.dtype, "to": entry.dtype})
        flat = flat_in(plan, self.result)
        names = {id(entry): name for name, entry in entries.items()}
        steps = [step.entry for step in plan.all_steps() if isinstance(step, Gather)]
        gathered = [names[id(entry)] for entry in steps if id(entry) in names]
        return {
            "renames": [{"from": old, "to": new} for old, new in self.renames.items()],
            "dropped": self.dropped,
            "like": None if like is None else like.label,
            "casts": casts,
            "gathered": gathered if flat is None else gathered_in(flat.tensors),
            "compacted": {"storages": self._dead[0], "nbytes": self._dead[1]},
            "operations": list(self.result.operations),
        }


_MAX_SECTIONS = 16
"""Sections that are tried; each is read as if it had been chosen."""


def unselected_weights(checkpoint: Checkpoint) -> list[str]:
    """The sections of the file that contain weights and are not the one selected."""
    return [s.path for s in checkpoint.sections if s.is_weights and not s.selected]


def read_section(file: Source, section: str | None, *, ignore_checksums: bool = False) -> Checkpoint:
    """The checkpoint in an open source with another section selected.

    Raises:
        CorruptError: the file was changed since it was opened.
        CkptkitError: the section cannot be selected.
    """
    checkpoint = reread(file, section=section, ignore_checksums=ignore_checksums)
    if file.changed():
        raise CorruptError("the file was changed while it was being read", path=file.path)
    return checkpoint


def read_others(
    checkpoint: Checkpoint, file: Source, *, ignore_checksums: bool = False
) -> Iterator[tuple[str, Checkpoint]]:
    """The checkpoint in a source with each other section selected, as far as it can be; the source stays open."""
    for path in unselected_weights(checkpoint)[:_MAX_SECTIONS]:
        try:
            other = read_section(file, path, ignore_checksums=ignore_checksums)
        except CkptkitError:
            if file.changed():
                raise
            continue  # it cannot be chosen
        yield path, other


def section_like(checkpoint: Checkpoint, file: Source, options: ConvertOptions) -> str | None:
    """The section whose weights are those of the model in ``options.like``; without a model, the selected one.

    Args:
        checkpoint: the content of the file.
        file: the file; it stays open.
        options: as requested.

    Raises:
        RewriteError: several sections fit, with different tensors; or none fits, and none is selected.
    """
    like, selected = options.like, checkpoint.origin.state_path
    if like is None or options.all_tensors or not unselected_weights(checkpoint):
        return selected
    found: dict[object, str] = {}
    labels: list[str] = []
    problems: list[str] = []
    mine = [(selected, checkpoint)] if selected is not None else []
    for path, each in chain(mine, read_others(checkpoint, file, ignore_checksums=options.ignore_checksums)):
        try:
            named = as_named(with_flat_cut(each, options), options)
        except RewriteError as error:
            problems.append(f"{path!r}: {error}")
            continue
        fittings = like.fittings(named.state_dict)
        for fitting in like.complete(fittings):
            tensors = _tensors(named, fitting)
            if tensors not in found:
                found[tensors] = path
                labels.append(command_line(["--section", path, *fitting.options]))
        problems.append(f"{path!r} {like.misfit(max(fittings, key=lambda fitting: len(fitting.sources)))}")
    if len(set(found.values())) > 1:
        raise RewriteError(
            f"{checkpoint.origin.path}: {len(found)} sets of tensors fit {like.label} equally well: those of "
            f"{listed(labels, between=', of ')}; name one with --section",
            path=checkpoint.origin.path,
            names=labels,
        )
    if not found and selected is None:
        raise RewriteError(
            f"{checkpoint.origin.path}: no section fits: {listed(problems, between='; ')}", path=checkpoint.origin.path
        )
    return next(iter(found.values()), selected)


def like_checkpoint(path: str) -> Like:
    """The weights of a checkpoint, to be like.

    Raises:
        SectionError: it has no one set of weights.
        PartError: it is a part of a checkpoint.
    """
    from ckptkit.rewrite.flat_parameters import keeps_order

    checkpoint, file = read(path)
    try:
        require_whole(checkpoint)
        if checkpoint.origin.state_path is None:
            weights = paths_listed(checkpoint.sections) or "no section contains any"
            raise SectionError(
                f"{path}: does not have exactly one set of weights to match ({weights})",
                path=path,
                names=weights_paths(checkpoint.sections),
            )
        return rewrite.Like(checkpoint.state_dict, label=path, is_ordered=keeps_order(checkpoint))
    finally:
        file.close()


def _tensors(checkpoint: Checkpoint, fitting: Fitting) -> object:
    """Equal for the same tensors of a file, whichever section they were read in."""
    values = ((name, checkpoint.state_dict.everything[source]) for name, source in sorted(fitting.sources.items()))
    return tuple(
        (name, value.storage.key, value.storage_offset, value.stride) if isinstance(value, TensorEntry) else name
        for name, value in values
    )
