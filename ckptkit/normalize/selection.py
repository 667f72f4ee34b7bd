"""Which of a file's sections is *the* state_dict, and what is beside it.

The state_dict is

1. the one asked for by its path.
2. The only one that contains weights.  One object, or the same tensors under the same names, in several places is one,
   and is where its keys are the most customary.
3. The only one left when those are put aside that no model would be (nothing in them is a floating-point tensor
   with at least one dimension: losses, metrics, random states), and those that are the weights under `MASTERS` at a
   lower precision.
4. The only one under customary keys (`CUSTOMARY_KEYS` of `ckptkit.normalize.shapes`, where need be inside
   one another or inside an `_ENVELOPES` key), unless another is a copy of it: holds at least half of
   its names, wrappers' prefixes aside.  An EMA, or the best epoch's weights, beside the raw ones is a
   choice to be made.
5. Else none: a generator and a discriminator, a teacher and a student, a list of models.

Values beside it are written with the weights only if the container can store them.  `earlier` gives the receipts in the
string metadata; `ckptkit.conversion` says what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptkit.checkpoint import STATE_DICT, Checkpoint, Section, StateDict, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import SectionError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.nearness import did_you_mean
from ckptkit.normalize.modules import unwrapped
from ckptkit.normalize.sections import Candidate, brief, step
from ckptkit.normalize.shapes import CUSTOMARY_KEYS, is_substantial
from ckptkit.pickling.inert import Object, mapping_items
from ckptkit.report import convert_command, count_of, human_size, listed

if TYPE_CHECKING:
    from ckptkit.normalize.tensors import FoundTensor

__all__ = [
    "BESIDE",
    "EMBEDDINGS",
    "KEY",
    "MASTERS",
    "choose",
    "discarded_text",
    "earlier",
    "held_instead",
    "holding_suffix",
    "is_copy",
    "other_parts",
    "other_weights",
    "paths_listed",
    "require_section",
    "require_state_dict",
    "sections_listed",
    "weights_paths",
]

_ENVELOPES = frozenset({"checkpoint", "ckpt", "trainer", "learner", "engine", "training_state", "train_state"})
"""Keys around the customary ones."""

MASTERS = "fp32"
"""The key of the weights that an optimizer steps, beside those of a forward pass at a lower precision."""

_RANK = {key: rank for rank, key in enumerate(CUSTOMARY_KEYS)}

_WRAPPERS = frozenset({"module", "model", "ema_model", "ema", "shadow"})
"""First segments of names in which copies of a model differ, besides those that `unwrapped` removes."""

_WRITING = ("to write", "to rewrite")
"""Purposes of weights that all tensors serve as well."""

_MAX_LISTED = 20
"""Sections named in a message."""


def choose(weights: Sequence[Candidate]) -> Candidate | None:
    """The candidate that is the checkpoint's state_dict; ``None``: none, or several could be."""
    weights = sorted(weights, key=_rank)
    distinct = list({id(candidate.module): candidate for candidate in reversed(weights)}.values())[::-1]
    if len(distinct) < 2:
        return distinct[0] if distinct else None
    contents = _contents(distinct)
    if contents is None:
        return None
    seen: set[frozenset[tuple[str, object]]] = set()
    unique: dict[int, dict[str, object]] = {}
    for index, values in enumerate(contents):
        tensors = frozenset((name, _identity(value)) for name, value in values.items())
        if tensors not in seen:
            seen.add(tensors)
            unique[index] = values
    models = {index: values for index, values in unique.items() if any(map(is_substantial, values.values()))}
    left = _without_lesser(models or unique, distinct)
    if len(left) == 1:
        return distinct[next(iter(left))]
    customary = [index for index in left if _rank(distinct[index]) < len(CUSTOMARY_KEYS)]
    if len(customary) != 1:
        return None
    names = left[customary[0]]
    if any(index != customary[0] and is_copy(values, names) for index, values in left.items()):
        return None
    return distinct[customary[0]]


def _without_lesser(
    contents: dict[int, dict[str, object]], candidates: Sequence[Candidate]
) -> dict[int, dict[str, object]]:
    """The contents but for those that are the masters at a lower precision: the same names and shapes."""
    masters = [index for index in contents if candidates[index].keys[-1:] == (MASTERS,)]
    if len(masters) != 1:
        return contents
    fine = contents[masters[0]]

    def is_lesser(values: dict[str, object]) -> bool:
        return values.keys() == fine.keys() and all(
            value is fine[name]
            or (
                isinstance(value, TensorEntry)
                and isinstance(own := fine[name], TensorEntry)
                and value.shape == own.shape
                and value.itemsize <= own.itemsize
            )
            for name, value in values.items()
        )

    return {index: values for index, values in contents.items() if index == masters[0] or not is_lesser(values)}


def is_copy(names: Iterable[str], weights: Iterable[str]) -> bool:
    """Whether names are those of a copy of some weights, an EMA or an earlier epoch's: at least half of them."""
    bare = set(map(_bare, weights))
    return 2 * len(bare & set(map(_bare, names))) >= len(bare)


def other_weights(checkpoint: Checkpoint, found: Iterable[FoundTensor]) -> dict[str, list[FoundTensor]]:
    """The sections of weights beside the selected ones that are not copies of them, with their own tensors.

    A model may be in two parts: a network and its ``generator``, ``likelihood`` or queue.

    Args:
        checkpoint: the file.
        found: what `every_tensor` finds in it, but for the plain tensors of the state_dict, which make no difference.
    """
    weights = {section.path for section in checkpoint.sections if section.is_weights and not section.selected}
    names: dict[str, list[FoundTensor]] = {}
    for each in found if weights and checkpoint.state_dict.everything else ():
        if each.is_own and each.section is not None and each.section in weights:
            names.setdefault(each.section, []).append(each)
    own = checkpoint.state_dict.everything
    return {path: inside for path, inside in names.items() if not is_copy((each.name for each in inside), own)}


def _rank(candidate: Candidate) -> int:
    """The place of its last key among the customary ones; their number where its keys are not all customary."""
    last = candidate.keys[-1] if candidate.keys else None
    above = candidate.keys[:-1]
    if not isinstance(last, str) or not all(
        isinstance(key, str) and (key in _ENVELOPES or key in _RANK) for key in above
    ):
        return len(CUSTOMARY_KEYS)
    return _RANK.get(last, len(CUSTOMARY_KEYS))


def _contents(candidates: Sequence[Candidate]) -> list[dict[str, object]] | None:
    """Each candidate's names and values; ``None`` where together they are more than any file's."""
    contents = []
    count = 0
    for candidate in candidates:
        values: dict[str, object] = {}
        for name, value in candidate.values():
            count += 1
            if count > DEFAULT_LIMITS.entries:
                return None
            values[name] = value
        contents.append(values)
    return contents


def _identity(value: object) -> object:
    return value.view if isinstance(value, TensorEntry) else id(value)


def _bare(name: str) -> str:
    name = unwrapped(name)
    while "." in name and name[: name.index(".")] in _WRAPPERS:
        name = name[name.index(".") + 1 :]
    return name


def require_section(sections: Sequence[Section], path: str) -> None:
    """See that the section asked for contains weights.

    Raises:
        SectionError: there is none with that path, or it contains something else.
    """
    asked = next((section for section in sections if section.path == path), None)
    if asked is not None and asked.is_weights:
        return
    what = (
        f"no section {path[:200]!r} contains weights"
        if asked is None
        else (f"section {path[:200]!r} contains no weights")
    )
    kind = "" if asked is None else f" (it is of kind {asked.kind!r})"
    told = sections_listed(sections) or "none"
    meant = did_you_mean(path, weights_paths(sections), shown=repr) if asked is None else ""
    raise SectionError(f"{what}{kind}; sections that do: {told}{meant}", names=weights_paths(sections))


def require_state_dict(checkpoint: Checkpoint, purpose: str) -> None:
    """See that weights are selected.

    Args:
        checkpoint: the content of the file.
        purpose: the use of the weights: ``"to load"``.

    Raises:
        SectionError: the file holds none, or several and none was named.
    """
    if checkpoint.origin.state_path is not None:
        return
    path = checkpoint.origin.path
    writes = purpose in _WRITING
    all_named = f"{convert_command(path, '--all-tensors')} takes all of them, each named by its keys"
    if weights := paths_listed(checkpoint.sections):
        message = f"{path}: several sections contain weights ({weights}); name the one {purpose} with --section"
        raise SectionError(
            f"{message}, or {all_named}" if writes else message, path=path, names=weights_paths(checkpoint.sections)
        )
    kind = f"its kind is {checkpoint.origin.kind!r}"
    message = f"{path}: the file contains no state_dict {purpose} ({kind}); {held_instead(checkpoint)}"
    has_tensors = any(section.tensors for section in checkpoint.sections)
    raise SectionError(f"{message}; {all_named}" if has_tensors else message, path=path)


def weights_paths(sections: Sequence[Section]) -> tuple[str, ...]:
    """The paths of the sections that contain weights."""
    return tuple(section.path for section in sections if section.is_weights)


def paths_listed(sections: Sequence[Section]) -> str:
    """The paths of the sections that contain weights; empty if there are none."""
    return listed((repr(path[:200]) for path in weights_paths(sections)), _MAX_LISTED)


def sections_listed(sections: Sequence[Section]) -> str:
    """The sections that contain weights, as a message names them: path, number of tensors, size."""
    weights = [section for section in sections if section.is_weights]
    told = [
        f"{section.path[:200]!r} ({'' if section.path else 'the whole file: '}"
        f"{count_of(section.tensors, 'tensor')}, {human_size(section.nbytes)})"
        for section in weights[:_MAX_LISTED]
    ]
    return listed(told, _MAX_LISTED, total=len(weights))


EMBEDDINGS = "string_to_param"
"""The key under which textual inversions have their embedding, beside a name and a step (AUTOMATIC1111's web UI)."""

_OTHER = "other objects"


def other_parts(checkpoint: Checkpoint) -> list[str]:
    """The keys of training state and whatever else is in the file beside the selected state_dict."""
    if checkpoint.rest is STATE_DICT or checkpoint.origin.is_program:  # the content of one means nothing to torch.load
        return []
    pairs = mapping_items(checkpoint.rest)
    if pairs is None:
        return [_OTHER]
    return [step(key) for key, value in pairs if value is not STATE_DICT]


def discarded_text(values: Sequence[object]) -> str:
    """The results that a pickle discards (`Checkpoint.discarded`), in a message: ``"a call of logging.info"``."""
    shown = [f"a call of {node.class_name:.100}" if isinstance(node, Object) else brief(node) for node in values[:5]]
    return listed(shown, 4, total=len(values))


def holding_suffix(state_dict: StateDict) -> str:
    """The extension of a file that can store these weights: ``.safetensors``, or ``.pth`` if that cannot."""
    plain = len(state_dict) == len(state_dict.everything)
    return ".safetensors" if plain and all(DTYPES[e.dtype].safetensors for e in state_dict.values()) else ".pth"


def held_instead(checkpoint: Checkpoint) -> str:
    """The message about a file whose weights have no names."""
    tensors = sum(section.tensors for section in checkpoint.sections)
    if not tensors:
        return "it contains no named tensors"
    own = any(finding.code == "own-script-state" for finding in checkpoint.findings)
    why = ": its modules save custom state" if own else ""
    return f"it contains {count_of(tensors, 'tensor')} without a model's names{why}"


KEY = "ckptkit_receipts"
"""The key of the metadata."""

BESIDE = "ckptkit_beside"
"""The key of the metadata under which plain values beside the weights are kept (`ckptkit.rewrite.beside`)."""


def earlier(metadata: Mapping[str, object]) -> list[object]:
    """The receipts a file came with; none where what is there is not a list."""
    text = metadata.get(KEY)
    try:
        receipts = json.loads(text) if isinstance(text, str) else []
    except (ValueError, RecursionError):
        return []
    return receipts if isinstance(receipts, list) else []
