"""The prefixes that wrappers of a model leave in names.

`MODULE` and ``_forward_module`` are taken for a wrapper's where they lead a name: further in, ``module`` may be
somebody's own attribute (``mlp_module.module.weight``), and only who knows the model can tell
(`inner_module_rules`).  The others are nobody's: they are a wrapper's wherever they stand.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import takewhile

from ckptkit.report import count_of

__all__ = [
    "MODULE",
    "inner_module_rules",
    "inner_module_told",
    "may_be_wrapped",
    "unwrapped",
    "unwrapped_in_digests",
    "unwrapped_path",
    "wrapper_of",
]

MODULE = "module"
"""The attribute DataParallel, DistributedDataParallel and others keep the wrapped model under."""

_COMPILED = "_orig_mod"
"""The attribute ``torch.compile`` keeps the original module under; it wraps submodules too."""

_ANYWHERE = frozenset({_COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""And those of FSDP and of activation checkpointing (torch/distributed/fsdp, ``checkpoint_wrapper``)."""

_LEADING = frozenset({MODULE, "_forward_module"})
"""Lightning keeps a wrapped LightningModule under the second."""

_WRAPPERS = _ANYWHERE | _LEADING

_INNER_MODULE = re.compile(rf"\.{MODULE}(?=\.)")

_FEW = 3
"""Modules with an inner `MODULE` that get a rule each."""


def unwrapped(name: str) -> str:
    """The name without wrappers.

    Segments of wrappers go in any order and nesting: leading ones, and those of torch's own wrappers anywhere
    (``model._orig_mod.layer``).  The last segment is never taken away.
    """
    return _without(name, _ANYWHERE, _LEADING) if _may_be_wrapped(name) else name


def _may_be_wrapped(name: str) -> bool:
    """Whether a closer look is worth its time: most names of most models are bare."""
    return name.startswith(("module.", "_forward_module.")) or "_orig_mod." in name or "_wrapped_module." in name


def may_be_wrapped(names: str) -> bool:
    """Whether any of many names is worth that look; each stands after a line break."""
    return any(mark in names for mark in ("\nmodule.", "\n_forward_module.", "_orig_mod.", "_wrapped_module."))


def unwrapped_in_digests(name: str) -> str:
    """The name as content digests and manifests have it: as `unwrapped` knew it first, so that old ones hold."""
    if not name.startswith(("module.", "_orig_mod.")) and "._orig_mod." not in name:
        return name
    return _without(name, {_COMPILED}, {MODULE})


def _without(name: str, anywhere: Collection[str], leading: Collection[str]) -> str:
    *parents, last = name.split(".")
    parents = [part for part in parents if part not in anywhere]
    kept = next((place for place, part in enumerate(parents) if part not in leading), len(parents))
    return ".".join([*parents[kept:], last])


def unwrapped_path(path: str) -> str:
    """A module's path without wrappers; ``""``: it is a wrapper of the root."""
    # It has no tensor's name at its end; a stand-in keeps the last segment apart.
    return unwrapped(path + ".x" if path else "x")[:-2]


def wrapper_of(name: str) -> str:
    """What wrappers put into a name: the prefix, else one that stands further in; ``""``: nothing."""
    if not _may_be_wrapped(name):
        return ""
    parents = name.split(".")[:-1]
    leading = list(takewhile(_WRAPPERS.__contains__, parents))
    return "".join(f"{part}." for part in leading or [part for part in parents if part in _ANYWHERE][:1])


def inner_module_rules(names: Sequence[str]) -> list[str]:
    r"""The rules ``REGEX=>REPLACEMENT`` that take `MODULE` off names where it stands further in; none do: none.

    Args:
        names: without wrappers: ``features.module.0.weight`` gives ``^features\.module\.=>features.``.
    """
    carrying = [name for name in names if _INNER_MODULE.search(name)]
    parents = dict.fromkeys(name.partition(f".{MODULE}.")[0] for name in carrying)
    is_simple = all(re.fullmatch(r"[\w.]+", parent) for parent in parents)
    if len(parents) > _FEW or not is_simple or any(len(_INNER_MODULE.findall(name)) > 1 for name in carrying):
        return [f"{_INNER_MODULE.pattern}=>"]
    return [rf"^{re.escape(parent)}\.{MODULE}\.=>{parent}." for parent in parents]


def inner_module_told(names: Sequence[str]) -> tuple[str, list[str]] | None:
    """What is said of names with `MODULE` further in, and the options that take it off; ``None``: there are none.

    No options are given where two names would become one.
    """
    carrying = [name for name in names if _INNER_MODULE.search(name)]
    if not carrying:
        return None
    import shlex  # what finds nothing starts faster without

    told = (
        f"{len(carrying)} of {count_of(len(names), 'name')} carry `{MODULE}.` further in, such as "
        f"{carrying[0]!r:.200}: DataParallel around a part of the model, or an attribute of the model's own"
    )
    if len({_INNER_MODULE.sub("", name) for name in names}) < len(names):
        return f"{told}; without it two names would be one", []
    options = [option for rule in inner_module_rules(names) for option in ("--rename", rule)]
    return f"{told}; {shlex.join(options)} takes it off", options
