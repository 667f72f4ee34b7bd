"""The prefixes that wrappers of a model leave in names."""

from __future__ import annotations

__all__ = ["MODULE", "unwrapped"]

MODULE = "module"
"""The attribute DataParallel and DistributedDataParallel keep the wrapped model under."""

_COMPILED = "_orig_mod"
"""The attribute ``torch.compile`` keeps the original module under; it wraps submodules too."""


def unwrapped(name: str) -> str:
    """The name without wrappers.

    Leading ``module`` and ``_orig_mod`` segments go, in any order, and ``_orig_mod`` anywhere
    (``model._orig_mod.layer``).  The last segment is never taken away.
    """
    if not name.startswith((MODULE + ".", _COMPILED + ".")) and f".{_COMPILED}." not in name:
        return name
    *parents, last = name.split(".")
    leading = 0
    while leading < len(parents) and parents[leading] in (MODULE, _COMPILED):
        leading += 1
    return ".".join([*(part for part in parents[leading:] if part != _COMPILED), last])
