"""Which of a file's sections is *the* state_dict.

1. The one asked for by its path.
2. The only one that holds weights.  One object, or the same tensors under the same names, in
   several places is one, and stands where its keys are the most customary.
3. The only one left when those are put aside that no model would be: nothing in them is a
   floating-point tensor with at least one dimension (losses, metrics, random states).
4. The only one under customary keys (`CUSTOMARY_KEYS` of `ckptkit.normalize.shapes`, where need be inside
   one another or inside an `_ENVELOPES` key), unless another is a copy of it: holds at least half of
   its names, wrappers' prefixes aside.  An EMA, or the best epoch's weights, beside the raw ones is a
   choice to be made.
5. Else none: a generator and a discriminator, a teacher and a student, a list of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptkit.checkpoint import Section, TensorEntry
from ckptkit.errors import SectionError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.sections import Candidate
from ckptkit.normalize.shapes import CUSTOMARY_KEYS, is_substantial
from ckptkit.normalize.wrappers import unwrapped
from ckptkit.report import count_of, human_size
from ckptkit.report import listed as enumerated

__all__ = ["choose", "is_copy", "listed", "paths_listed", "require_section"]

_ENVELOPES = frozenset({"checkpoint", "ckpt", "trainer", "learner", "engine", "training_state", "train_state"})
"""Keys around the customary ones."""

_RANK = {key: rank for rank, key in enumerate(CUSTOMARY_KEYS)}

_WRAPPERS = frozenset({"module", "model", "ema_model", "ema", "shadow"})
"""First segments of names that copies of a model differ by, beside what `unwrapped` takes off."""

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
    left = models or unique
    if len(left) == 1:
        return distinct[next(iter(left))]
    customary = [index for index in left if _rank(distinct[index]) < len(CUSTOMARY_KEYS)]
    if len(customary) != 1:
        return None
    names = left[customary[0]]
    if any(index != customary[0] and is_copy(values, names) for index, values in left.items()):
        return None
    return distinct[customary[0]]


def is_copy(names: Iterable[str], weights: Iterable[str]) -> bool:
    """Whether names are those of a copy of some weights, an EMA or an earlier epoch's: at least half of them."""
    bare = set(map(_bare, weights))
    return 2 * len(bare & set(map(_bare, names))) >= len(bare)


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
    """See that the section asked for holds weights.

    Raises:
        SectionError: there is none of that path, or it holds something else.
    """
    asked = next((section for section in sections if section.path == path), None)
    if asked is not None and asked.is_weights:
        return
    what = f"no section {path[:200]!r} holds weights" if asked is None else f"section {path[:200]!r} holds no weights"
    kind = "" if asked is None else f" (it is of kind {asked.kind!r})"
    raise SectionError(f"{what}{kind}; sections that do: {listed(sections) or 'none'}")


def paths_listed(sections: Sequence[Section]) -> str:
    """The paths of the sections that hold weights; empty where there are none."""
    return enumerated((repr(section.path[:200]) for section in sections if section.is_weights), _MAX_LISTED)


def listed(sections: Sequence[Section]) -> str:
    """The sections that hold weights, as a message names them: path, number of tensors, size."""
    weights = [section for section in sections if section.is_weights]
    told = [
        f"{section.path[:200]!r} ({count_of(section.tensors, 'tensor')}, {human_size(section.nbytes)})"
        for section in weights[:_MAX_LISTED]
    ]
    return enumerated(told, _MAX_LISTED, total=len(weights))
