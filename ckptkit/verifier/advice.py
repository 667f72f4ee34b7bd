r"""What to do about a checkpoint that does not fit: the one cause behind many names.

Old names, beside the prefixes of wrappers; the form is that of ``convert --rename``:

- torchvision's DenseNets before 0.3 had a dot in ``norm.1`` and ``conv.2``, which their own
  ``_load_state_dict`` rewrote when weights were downloaded (``torchvision/models/densenet.py``)
- ``gamma`` and ``beta`` of LayerNorm, from the TensorFlow releases of BERT, which transformers renames in
  ``PreTrainedModel`` when it loads
- ``weight_g`` and ``weight_v`` of the old ``weight_norm``, and the other way round: torch's own hook renames
  the old ones for the new alone (``torch/nn/utils/parametrizations.py``); it does neither for ``spectral_norm``
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.checkpoint import Checkpoint, StateDict
from ckptkit.errors import RewriteError
from ckptkit.normalize.wrappers import wrapper_of
from ckptkit.report import count_of
from ckptkit.rewrite.prefix import AddModule, AddPrefix, StripModule, StripPrefix
from ckptkit.rewrite.rename import Rename as RenameByRule
from ckptkit.verifier.measure import ShapeMismatch

__all__ = ["Rename", "head_classes", "matching", "rename_that_fits"]

_OLD_NAMES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "names of torchvision's DenseNets before 0.3",
        ((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),),
    ),
    ("`gamma` and `beta` of older BERT weights", ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))),
    (
        "names of torch.nn.utils.parametrizations.weight_norm, where the reference has the older weight_norm",
        (
            (r"(^|\.)parametrizations\.([^.]+)\.original0$", r"\1\2_g"),
            (r"(^|\.)parametrizations\.([^.]+)\.original1$", r"\1\2_v"),
        ),
    ),
    (
        "names of torch.nn.utils.parametrizations.spectral_norm, where the reference has the older spectral_norm",
        (
            (r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2_orig"),
            (r"(^|\.)parametrizations\.([^.]+)\.0\.(_[uv])$", r"\1\2\3"),
        ),
    ),
    (
        "names of the older spectral_norm, where the reference has torch.nn.utils.parametrizations.spectral_norm",
        (
            (r"(^|\.)([^.]+)_orig$", r"\1parametrizations.\2.original"),
            (r"(^|\.)([^.]+)(_[uv])$", r"\1parametrizations.\2.0.\3"),
        ),
    ),
)
"""What the names are, and the rules that make today's of them."""

_SAMPLED = 8
"""Names looked at to guess a prefix: a wrapper is the same on all."""


Rewriter = Callable[[Checkpoint], Checkpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rename:
    """A change of names after which a checkpoint fits.

    Attributes:
        code: of the finding that tells it.
        cause: what is wrong with the names now.
        options: of ``convert``, to carry it out.
        rewriters: what these options do, in order.
        matched: how many of the model's tensors are there afterwards, with their shape.
        unexpected: how many of the checkpoint's names are not the model's even then.
    """

    code: str
    cause: str
    options: tuple[str, ...]
    rewriters: tuple[Rewriter, ...]
    matched: int = 0
    unexpected: int = 0


def rename_that_fits(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], already: int = 0
) -> Rename | None:
    """The rewrite of names that makes most of the model's tensors fit, if one does.

    Args:
        checkpoint: the checkpoint as it is.
        expected: the model's names and shapes.
        already: how many fit as it is; a rewrite has to bring more.
    """
    needed = max(len(expected) // 2, already)
    best: Rename | None = None
    for candidate in _candidates(list(checkpoint.state_dict.everything), expected):
        after = checkpoint
        try:
            for rewriter in candidate.rewriters:
                after = rewriter(after)
        except RewriteError:
            continue  # two names would become one
        matched = matching(after.state_dict, expected)
        if matched > needed and (best is None or matched > best.matched):
            unexpected = sum(name not in expected for name in after.state_dict.everything)
            best = replace(candidate, matched=matched, unexpected=unexpected)
    return best


def matching(state_dict: StateDict, expected: Mapping[str, tuple[int, ...]]) -> int:
    """How many of the names are there, with their shape."""
    return sum(name in state_dict and state_dict[name].shape == shape for name, shape in expected.items())


def _candidates(names: Sequence[str], expected: Collection[str]) -> Iterator[Rename]:
    wrapped = [name for name in names if wrapper_of(name)]
    if wrapped:
        cause = f"{_count(len(wrapped), names)} carry `{wrapper_of(wrapped[0])}`"
        yield _prefix(cause, StripModule(), "--strip-module")
    if any(name.startswith("module.") for name in expected):
        yield _prefix(f"the reference's names carry `module.`, {_none(names)}", AddModule(), "--add-module")
    for prefix in _prefixes(names, expected):
        carrying = sum(name.startswith(prefix) for name in names)
        cause = f"{_count(carrying, names)} carry `{prefix}`"
        yield _prefix(cause, StripPrefix(prefix), "--strip-prefix", prefix)
    for prefix in _prefixes(expected, names):
        cause = f"the reference's names carry `{prefix}`, {_none(names)}"
        yield _prefix(cause, AddPrefix(prefix), "--add-prefix", prefix)
    for what, rules in _OLD_NAMES:
        old = sum(any(re.search(pattern, name) for pattern, _ in rules) for name in names)
        if not old:
            continue
        cause = f"{_count(old, names)} are {what}"
        options = tuple(part for rule in rules for part in ("--rename", "=>".join(rule)))
        by_rule = RenameByRule(rules)
        yield Rename(code="old-names", cause=cause, options=options, rewriters=(by_rule,))
        if wrapped:
            both = ("--strip-module", *options)
            yield Rename(code="old-names", cause=cause, options=both, rewriters=(StripModule(), by_rule))


def _prefix(cause: str, rewriter: Rewriter, *options: str) -> Rename:
    return Rename(code="wrapper-prefix", cause=cause, options=options, rewriters=(rewriter,))


def _count(carrying: int, names: Sequence[str]) -> str:
    return f"{carrying} of {count_of(len(names), 'key')}"


def _none(names: Sequence[str]) -> str:
    return f"none of the {count_of(len(names), 'key')} does"


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
