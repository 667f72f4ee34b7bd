"""Long lists of names, folded by module for messages; documents keep them whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ckptkit.rewrite.names import module_paths

__all__ = ["folded"]


def folded(names: Collection[str], among: Collection[str]) -> list[str]:
    """The names, with ``layer4.* (30)`` in place of those of a module all of whose names are among them.

    Args:
        names: what is missing, say.
        among: all names there are on that side; those given are of them.
    """
    everything = Counter(path for name in among for path in module_paths(name))
    given = Counter(path for name in names for path in module_paths(name))
    lines: dict[str, None] = {}
    for name in names:
        whole = next((path for path in module_paths(name) if given[path] == everything[path] > 1), None)
        lines[name if whole is None else f"{whole}.* ({given[whole]:,})"] = None
    return list(lines)
