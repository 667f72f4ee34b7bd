r"""Fitting a state_dict to a model: which of its tensors are the model's, under which other names.

Names and shapes decide, no value is read.  A change of names is up to three steps: wrappers come off, old names
become today's, one prefix comes off or is put on.  What ``verify`` advises and what ``convert --like`` does go by
the same fittings.

An inner ``module`` (``features.module.0.weight``) may be a model's own attribute, so it is removed only if the model
has no module at that path.  Old names, as regular expressions:

- torchvision's DenseNets before 0.3 had a dot in ``norm.1`` and ``conv.2``, which their own
  ``_load_state_dict`` rewrote when weights were downloaded (``torchvision/models/densenet.py``)
- ``gamma`` and ``beta`` of LayerNorm, from the TensorFlow releases of BERT, which transformers renames in
  ``PreTrainedModel`` when it loads
- ``weight_g`` and ``weight_v`` of the old ``weight_norm``, and the other way round: torch's own hook only renames old
  names to new ones (``torch/nn/utils/parametrizations.py``); it does neither for ``spectral_norm``
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, TensorEntry, tied_groups
from ckptkit.errors import RewriteError
from ckptkit.normalize.modules import wrapper_of
from ckptkit.pickling.inert import mapping_items
from ckptkit.report import count_of, listed
from ckptkit.rewrite.names import module_paths, moved_versions
from ckptkit.rewrite.rename import AddModule, AddPrefix, Rename, StripModule, StripPrefix
from ckptkit.shell import command_line
from ckptkit.startup import dataclass

__all__ = ["Fitting", "Like"]

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
"""The kind of the names, and the rules that turn them into today's."""

_SAMPLED = 8
"""Names looked at to guess a prefix, of the longest and once more of all: a wrapper is the same on all."""

_INNER = re.compile(r"(?:^|\.)([^.]+)\.module(?=\.)")
"""An inner ``module``, and the segment before it."""

_MAX_PREFIXES = 8
"""Prefixes that are tried: each costs a walk over all names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A change of names: the problem with them now, and what ``convert`` does about it."""

    cause: str
    options: tuple[str, ...]
    renamer: StripModule | AddModule | StripPrefix | AddPrefix | Rename
    is_old: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """A change of names, and how a state_dict fits a model after it.

    Attributes:
        causes: the problems with the names now; empty: they do not change.
        options: of ``convert``, to change them.
        is_old: whether they are another release's.
        sources: names of the model that are there with their shape, and the names they have now.
        differing: names of the model that are there with another shape, or as no plain tensor: both sides, in words.
        missing: names of the model that are not there, less those in the next two fields.
        aliases: names of the model that are not there but tied in it to one that is: that one.
        counters: BatchNorm's counts of batches that are not there and that torch adds when it loads: the layer's
            recorded version is before 2, or none is (``torch/nn/modules/batchnorm.py``).
        unexpected: current names that even then are not the model's.
    """

    causes: tuple[str, ...]
    options: tuple[str, ...]
    is_old: bool
    sources: Mapping[str, str]
    differing: Mapping[str, str]
    missing: tuple[str, ...]
    aliases: Mapping[str, str]
    counters: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of the model is there, with its shape."""
        return not self.missing and not self.differing

    @property
    def label(self) -> str:
        """The options that change the names."""
        return command_line(self.options) or "the names as they are"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Like:
    """Keep exactly the tensors of a model, under its names and in its order; everything else in the file is left out.

    If the model ties a missing name to one in the file, it becomes another name of that tensor.  Nothing else is added.

    Args:
        expected: the model's names, each with its shape or a value that has one: ``model.state_dict()``, or the
            ``state_dict`` of an open checkpoint.  ``None`` instead of a shape: any value with that name.
        tied: groups of names that are one tensor in the model; those of a checkpoint are known.
        label: the model, for messages.
        is_ordered: whether the names are in the model's own order, without which flat parameters cannot be split.

    Raises:
        RewriteError: there are no names; (when applied) a tensor is missing or has another shape, or different
            tensors fit equally.
    """

    expected: Mapping[str, Any]
    tied: Sequence[Sequence[str]] = ()
    label: str = "the reference"
    is_ordered: bool = True

    def __post_init__(self) -> None:
        given = self.expected
        if isinstance(given, StateDict):
            object.__setattr__(self, "tied", (*self.tied, *tied_groups(given)))
            given = given.everything
        if not given:
            raise RewriteError(f"{self.label} has no tensors to compare with")
        object.__setattr__(self, "expected", {name: _shape(value) for name, value in given.items()})

    def __repr__(self) -> str:
        return f"Like({self.label!r})"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        checkpoint = self.cut(checkpoint)
        state_dict, fitting = checkpoint.state_dict, self.fitting(checkpoint)
        names = {**fitting.sources, **{name: fitting.sources[twin] for name, twin in fitting.aliases.items()}}
        everything = {name: state_dict.everything[names[name]] for name in self.expected if name in names}
        versions = state_dict.versions
        if versions is not None:
            targets = {source: name for name, source in fitting.sources.items()}
            kept = {"", *(path for source in targets for path in module_paths(source))}
            versions = {path: entry for path, entry in versions.items() if path in kept}
            versions = moved_versions(versions, targets, lambda path: path)
        # The mapping's attributes are not tensors of the model either.
        return checkpoint.replace(state_dict=StateDict(everything, versions=versions), rest=STATE_DICT)

    def cut(self, checkpoint: Checkpoint, rename: Callable[[str], str] | None = None) -> Checkpoint:
        """The checkpoint with its flat parameters split into the model's; unchanged if it has none.

        Args:
            checkpoint: of all ranks together.
            rename: from names in it to new names.

        Raises:
            RewriteError: they are not the model's.
        """
        if checkpoint.part is None or not checkpoint.part.remedy:
            return checkpoint
        from ckptkit.rewrite.flat_parameters import cut_flat

        return cut_flat(checkpoint, self.expected, self.tied, self.label, is_ordered=self.is_ordered, rename=rename)

    def fitting(self, checkpoint: Checkpoint) -> Fitting:
        """The one fitting that has every tensor of the model; if the names fit apart from wrappers, it is that one.

        Raises:
            RewriteError: no set of tensors fits, or several different ones do.
        """
        found = self.fittings(checkpoint.state_dict)
        complete = self.complete(found)
        if not complete:
            best = max(found, key=lambda fitting: len(fitting.sources))
            raise RewriteError(
                f"{checkpoint.origin.path}: {self.misfit(best)}", path=checkpoint.origin.path, names=best.missing
            )
        if len(complete) > 1:
            raise RewriteError(
                f"{checkpoint.origin.path}: {len(complete)} sets of tensors fit {self.label} equally well: those "
                f"of {listed([fitting.label for fitting in complete], between=', of ')}; give one of these options too",
                path=checkpoint.origin.path,
            )
        return complete[0]

    @staticmethod
    def complete(fittings: Sequence[Fitting]) -> list[Fitting]:
        """The fittings that have every tensor of the model; if the names fit apart from wrappers, only that one."""
        found = [fitting for fitting in fittings if fitting.is_complete]
        return found[:1] if found and found[0].options in ((), ("--strip-module",)) else found

    def misfit(self, fitting: Fitting) -> str:
        """Why a fitting is not complete."""
        problems = []
        if fitting.missing:
            verb = "is" if len(fitting.missing) == 1 else "are"
            of = f"of its {count_of(len(self.expected), 'tensor')} {verb} not there"
            problems.append(f"{len(fitting.missing)} {of}: {listed(fitting.missing)}")
        if fitting.differing:
            count = count_of(len(fitting.differing), "tensor", "has", "have")
            shapes = [f"{name} {told}" for name, told in fitting.differing.items()]
            problems.append(f"{count} another shape: {listed(shapes)}")
        renamed = f" after {fitting.label}" if fitting.options else ""
        return f"does not contain the tensors of {self.label}{renamed}: {'; '.join(problems)}"

    def fittings(self, state_dict: StateDict) -> list[Fitting]:
        """The names without changes, then each change of names that selects other tensors, smallest change first."""
        found: dict[tuple[object, ...], Fitting] = {}
        for steps in _changes(list(state_dict.everything), self.expected):
            try:
                names = _renamed(state_dict.everything, steps)
            except RewriteError:
                continue  # nothing is left of a name
            if len(set(names)) < len(names):
                continue  # two names would become one
            fitting = self._measured(state_dict, dict(zip(names, state_dict.everything, strict=True)), steps)
            found.setdefault(_tensors(state_dict, fitting), fitting)
            if not steps and fitting.is_complete:
                break  # what else would fit counts less
        return list(found.values())

    def _measured(self, state_dict: StateDict, names: Mapping[str, str], steps: Sequence[_Step]) -> Fitting:
        """How the state_dict fits under new names; ``names`` is from these to the present ones."""
        sources: dict[str, str] = {}
        differing: dict[str, str] = {}
        for name, shape in self.expected.items():
            if name in names:
                value = state_dict.everything[names[name]]
                here = _shape(value)
                if shape in (None, here):
                    sources[name] = names[name]
                else:
                    differing[name] = (
                        f"{'is not a plain tensor' if here is None else list(here)} instead of {list(shape)}"
                    )
        absent = [name for name in self.expected if name not in names]
        twins = {name: twin for group in self.tied for twin in group if twin in sources for name in group}
        aliases = {name: twins[name] for name in absent if name in twins}
        layers = {name.rpartition(".")[0]: source.rpartition(".")[0] for name, source in sources.items()}
        counters = tuple(name for name in absent if _is_added(name, layers, state_dict))
        return Fitting(
            causes=tuple(step.cause for step in steps),
            options=tuple(option for step in steps for option in step.options),
            is_old=any(step.is_old for step in steps),
            sources=sources,
            differing=differing,
            missing=tuple(name for name in absent if name not in aliases and name not in counters),
            aliases=aliases,
            counters=counters,
            unexpected=tuple(source for name, source in names.items() if name not in self.expected),
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape that is given, or that something has; ``None``: it has none that is known."""
    shape = value if isinstance(value, tuple) else getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _tensors(state_dict: StateDict, fitting: Fitting) -> tuple[object, ...]:
    """Equal for fittings that give the model the same tensors."""
    values = {name: state_dict.everything[source] for name, source in fitting.sources.items()}
    same = {name: value.view if isinstance(value, TensorEntry) else id(value) for name, value in values.items()}
    return (*sorted(same.items()), *fitting.differing)


def _is_added(name: str, layers: Mapping[str, str], state_dict: StateDict) -> bool:
    """Whether torch adds what is not there: the count of batches of a BatchNorm from before there were any."""
    layer, _, last = name.rpartition(".")
    if last != "num_batches_tracked" or layer not in layers:
        return False
    recorded = dict(mapping_items((state_dict.versions or {}).get(layers[layer])) or [])
    version = recorded.get("version")
    return not isinstance(version, int) or version < 2


# Changes of names.


def _renamed(names: Collection[str], steps: Sequence[_Step]) -> list[str]:
    renamed = list(names)
    for step in steps:
        renamed = [step.renamer.rename(name) for name in renamed]
    return renamed


def _changes(names: Sequence[str], expected: Collection[str]) -> Iterator[tuple[_Step, ...]]:
    """No change, and every other that may make the names match; steps in the order of ``convert``."""
    starts = [(off, old) for off in _unwrappings(names, expected) for old in ((), *_old(_renamed(names, off)))]
    yield from ((*off, *old) for off, old in starts)
    for off, old in starts:
        now = _renamed(names, (*off, *old))
        # Rules go last, so what comes after one is a rule itself.
        for prefix in _prefixes_off_and_on(now, expected, as_rule=bool(off) and "--rename" in off[-1].options):
            yield (*off, prefix, *old)


def _unwrappings(names: Sequence[str], expected: Collection[str]) -> Iterator[tuple[_Step, ...]]:
    """Wrappers kept, removed, and removed together with inner ones called ``module``."""
    yield ()
    off: tuple[_Step, ...] = ()
    wrapped = [name for name in names if wrapper_of(name)]
    if wrapped:
        cause = f"{_count(len(wrapped), names)} have `{wrapper_of(wrapped[0])}`"
        off = (_Step(cause=cause, options=("--strip-module",), renamer=StripModule()),)
        yield off
    bare = _renamed(names, off)
    inner = [name for name in bare if ".module." in name]
    if inner:
        cause = f"{_count(len(inner), names)} have an inner `module.`"
        if rules := _inner_rules(inner, expected):
            yield (*off, _rules(cause, *rules))


def _inner_rules(inner: Sequence[str], expected: Collection[str]) -> list[tuple[str, str]]:
    """The rules that take inner ``module`` segments off, but for those that the model has itself."""
    own = {found[1] for name in expected for found in _INNER.finditer(name)}
    if not own:
        return [(r"(\.module)+\.", ".")]
    parents = {found[1] for name in inner for found in _INNER.finditer(name)} - own
    return [(rf"(^|\.){re.escape(parent)}\.module\.", rf"\g<1>{_literal(parent)}.") for parent in sorted(parents)]


def _prefixes_off_and_on(names: Sequence[str], expected: Collection[str], *, as_rule: bool) -> Iterator[_Step]:
    none = f"none of the {count_of(len(names), 'key')} does"
    if any(name.startswith("module.") for name in expected) and not as_rule:
        cause = f"the reference's names have `module.`, {none}"
        yield _Step(cause=cause, options=("--add-module",), renamer=AddModule())
    for prefix in _prefixes(names, expected):
        cause = f"{_count(sum(name.startswith(prefix) for name in names), names)} have `{prefix}`"
        yield (
            _rules(cause, ("^" + re.escape(prefix), ""))
            if as_rule
            else _Step(cause=cause, options=("--strip-prefix", prefix), renamer=StripPrefix(prefix))
        )
    for prefix in _prefixes(expected, names):
        cause = f"the reference's names have `{prefix}`, {none}"
        yield (
            _rules(cause, ("^", _literal(prefix)))
            if as_rule
            else _Step(cause=cause, options=("--add-prefix", prefix), renamer=AddPrefix(prefix))
        )


def _old(names: Sequence[str]) -> Iterator[tuple[_Step]]:
    for what, rules in _OLD_NAMES:
        old = sum(any(re.search(pattern, name) for pattern, _ in rules) for name in names)
        if old:
            yield (replace(_rules(f"{_count(old, names)} are {what}", *rules), is_old=True),)


def _rules(cause: str, *rules: tuple[str, str]) -> _Step:
    options = tuple(part for rule in rules for part in ("--rename", "=>".join(rule)))
    return _Step(cause=cause, options=options, renamer=Rename(rules))


def _literal(text: str) -> str:
    """The text as a replacement of ``re.sub``."""
    return text.replace("\\", r"\\")


def _count(carrying: int, names: Sequence[str]) -> str:
    return f"{carrying} of {count_of(len(names), 'key')}"


def _prefixes(longer: Collection[str], shorter: Collection[str]) -> list[str]:
    """The text before a shorter name in longer ones; the most frequent first."""
    found: Counter[str] = Counter()
    names = sorted(shorter, key=len, reverse=True)
    for name in dict.fromkeys([*names[:_SAMPLED], *names[:: len(names) // _SAMPLED + 1]]):
        found.update(long[: -len(name)] for long in longer if long.endswith("." + name))
    return [prefix for prefix, _ in found.most_common(_MAX_PREFIXES)]
