"""What to do about a checkpoint that does not fit: the one cause behind many names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import RewriteError
from ckptkit.rewrite.prefix import AddModule, AddPrefix, StripModule, StripPrefix
from ckptkit.verifier.measure import ShapeMismatch

__all__ = ["Rename", "head_classes", "rename_that_fits", "torchvision_argument"]

_SAMPLED = 8
"""Names looked at to guess a prefix: a wrapper is the same on all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rename:
    """A change of names after which a checkpoint fits.

    Attributes:
        cause: what is wrong with the names now.
        matched: how many of the model's tensors are there afterwards, with their shape.
        options: of ``convert``, to carry it out.
    """

    cause: str
    matched: int
    options: tuple[str, ...]


def rename_that_fits(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> Rename | None:
    """The rewrite of names that makes most of the model's tensors fit, if one does.

    Args:
        checkpoint: the checkpoint as it is.
        expected: the model's names and shapes.
    """
    names = list(checkpoint.state_dict.everything)
    needed = len(expected) // 2
    best: Rename | None = None
    for rewriter, options, cause in _candidates(names, expected):
        try:
            after = rewriter(checkpoint).state_dict
        except RewriteError:
            continue  # two names would become one
        matched = sum(name in after and after[name].shape == shape for name, shape in expected.items())
        if matched > needed and (best is None or matched > best.matched):
            best = Rename(cause=cause, matched=matched, options=options)
    return best


def _candidates(
    names: Sequence[str], expected: Collection[str]
) -> Iterator[tuple[Callable[[Checkpoint], Checkpoint], tuple[str, ...], str]]:
    wrapped = [name for name in names if name.startswith(("module.", "_orig_mod.")) or "._orig_mod." in name]
    if wrapped:
        wrapper = "module." if any(name.startswith("module.") for name in wrapped) else "_orig_mod."
        yield StripModule(), ("--strip-module",), f"{_count(len(wrapped), names)} carry `{wrapper}`"
    if any(name.startswith("module.") for name in expected):
        yield AddModule(), ("--add-module",), f"the reference's names carry `module.`, {_none(names)}"
    for prefix in _prefixes(names, expected):
        carrying = sum(name.startswith(prefix) for name in names)
        yield StripPrefix(prefix), ("--strip-prefix", prefix), f"{_count(carrying, names)} carry `{prefix}`"
    for prefix in _prefixes(expected, names):
        yield AddPrefix(prefix), ("--add-prefix", prefix), f"the reference's names carry `{prefix}`, {_none(names)}"


def _count(carrying: int, names: Sequence[str]) -> str:
    return f"{carrying} of {len(names)} keys"


def _none(names: Sequence[str]) -> str:
    return f"none of the {len(names)} keys does"


def _prefixes(longer: Collection[str], shorter: Collection[str]) -> list[str]:
    """What stands before a shorter name in longer ones; the most frequent first."""
    found: Counter[str] = Counter()
    for name in sorted(shorter, key=len, reverse=True)[:_SAMPLED]:
        found.update(long[: -len(name)] for long in longer if long.endswith("." + name))
    return [prefix for prefix, _ in found.most_common(3)]


def head_classes(mismatches: Sequence[ShapeMismatch]) -> tuple[int, int] | None:
    """The two numbers of classes when a head of another size explains all mismatches: the file's, the reference's.

    So it is when all differ in their first dimension alone, and in the same proportion (a detector's
    box head has four outputs for each class).
    """
    for m in mismatches:
        if not m.checkpoint or len(m.checkpoint) != len(m.reference) or m.checkpoint[1:] != m.reference[1:]:
            return None
    ours = min((m.checkpoint[0] for m in mismatches), default=0)
    theirs = min((m.reference[0] for m in mismatches), default=0)
    if not ours or any(m.checkpoint[0] * theirs != m.reference[0] * ours for m in mismatches):
        return None
    return ours, theirs


def torchvision_argument(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """The ``--model-arg`` of a torchvision builder that explains an auxiliary classifier too much or too few."""
    if missing and not unexpected and all(name.startswith(("aux1.", "aux2.", "AuxLogits.")) for name in missing):
        return "aux_logits=False"
    if unexpected and not missing and all(name.startswith("aux_classifier.") for name in unexpected):
        return "aux_loss=True"
    return None
