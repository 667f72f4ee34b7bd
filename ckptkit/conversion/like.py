"""Which of a file's weights are those of a model: each section is tried as if it had been chosen."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import chain

from ckptkit.checkpoint import Checkpoint, TensorEntry
from ckptkit.conversion.options import Options
from ckptkit.errors import CkptkitError, RewriteError
from ckptkit.formats import read
from ckptkit.report import listed
from ckptkit.rewrite.like import Fitting

__all__ = ["read_others", "section_like", "unselected_weights"]

_MAX_SECTIONS = 16
"""Sections that are tried; each is read as if it had been chosen."""


def unselected_weights(checkpoint: Checkpoint) -> list[str]:
    """The sections of the file that hold weights and are not the one selected."""
    return [s.path for s in checkpoint.sections if s.is_weights and not s.selected]


def read_others(checkpoint: Checkpoint, *, ignore_checksums: bool = False) -> Iterator[tuple[str, Checkpoint]]:
    """The checkpoint with each other section selected, as far as it can be; each is closed before the next."""
    for path in unselected_weights(checkpoint)[:_MAX_SECTIONS]:
        try:
            other, file = read(checkpoint.origin.path, section=path, ignore_checksums=ignore_checksums)
        except CkptkitError:
            continue  # it cannot be chosen
        try:
            yield path, other
        finally:
            file.close()


def section_like(checkpoint: Checkpoint, options: Options, *, ignore_checksums: bool = False) -> str | None:
    """The section whose weights are those of the model of ``options.like``; where none is, the selected one.

    Raises:
        RewriteError: several are, of different tensors; or none is, and none is selected.
    """
    like, selected = options.like, checkpoint.origin.state_path
    if like is None or not unselected_weights(checkpoint):
        return selected
    found: dict[object, str] = {}
    labels: list[str] = []
    problems: list[str] = []
    mine = [(selected, checkpoint)] if selected is not None else []
    for path, each in chain(mine, read_others(checkpoint, ignore_checksums=ignore_checksums)):
        try:
            named = options.as_named(each)
        except RewriteError as error:
            problems.append(f"{path!r}: {error}")
            continue
        fittings = like.fittings(named.state_dict)
        for fitting in like.complete(fittings):
            tensors = _tensors(named, fitting)
            if tensors not in found:
                found[tensors] = path
                labels.append(shlex.join(["--section", path, *fitting.options]))
        problems.append(f"{path!r} {like.misfit(max(fittings, key=lambda fitting: len(fitting.sources)))}")
    if len(set(found.values())) > 1:
        raise RewriteError(
            f"{checkpoint.origin.path}: {len(found)} sets of tensors fit {like.label} equally: those of "
            f"{listed(labels, between=', of ')}; name one with --section"
        )
    if not found and selected is None:
        raise RewriteError(f"{checkpoint.origin.path}: no section fits: {listed(problems, between='; ')}")
    return next(iter(found.values()), selected)


def _tensors(checkpoint: Checkpoint, fitting: Fitting) -> object:
    """Equal for the same tensors of a file, whichever section they were read in."""
    values = ((name, checkpoint.state_dict.everything[source]) for name, source in sorted(fitting.sources.items()))
    return tuple(
        (name, value.storage.key, value.storage_offset, value.stride) if isinstance(value, TensorEntry) else name
        for name, value in values
    )
