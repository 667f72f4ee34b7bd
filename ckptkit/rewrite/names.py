"""Renaming as such: the names of a state_dict, and what in a checkpoint goes by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import KeyCollisionError
from ckptkit.pickling.inert import InertDict, Object, TreeMap, mapping_items, walk

__all__ = ["module_paths", "moved_versions", "renamed", "wrapper_versions"]

_MAX_LEVELS = 64
"""Nested modules that are examined in a name; a stranger's name may have a million dots."""


def renamed(checkpoint: Checkpoint, rename: Callable[[str], str], versions: Mapping[str, object] | None) -> Checkpoint:
    """The checkpoint with tensor names, and the names in optimizers' state, renamed.

    Args:
        checkpoint: with the old names.
        rename: from old name to new name, for the names of the state_dict.
        versions: the module versions that go with the new names.

    Raises:
        KeyCollisionError: two names would become one.
    """
    state_dict = checkpoint.state_dict.renamed(rename, versions)
    pairs = zip(checkpoint.state_dict.everything, state_dict.everything, strict=True)
    changed = {old: new for old, new in pairs if old != new}
    return checkpoint.replace(state_dict=state_dict, rest=_renamed_rest(checkpoint.rest, changed))


def _renamed_rest(rest: object, changed: Mapping[str, str]) -> object:
    """The rest, with the state_dict's names changed where an optimizer goes by them.

    - ``param_groups[i]["param_names"]``: for people and tools, beside numbers by which torch matches
    - ``state[NAME]`` and ``param_groups[i]["params"]``: of FSDP and ``torch.distributed.checkpoint``
    - ``state.NAME.exp_avg`` and ``param_groups.NAME.lr``: the same, flattened

    Names that the state_dict does not have stay: they may be another model's.

    Raises:
        KeyCollisionError: two of an optimizer's names would become one.
    """
    sequences: list[tuple[object, object]] = []
    keys: list[tuple[InertDict | Object, list[object]]] = []
    for node in walk(rest) if changed else ():
        found = mapping_items(node)
        if not found:
            continue
        members = {key: value for key, value in found if isinstance(key, str)}
        if "params" in members:
            for names in (members["params"], members.get("param_names")):
                if isinstance(names, (list, tuple)) and (new := _changed(names, changed.get)):
                    sequences.append((names, type(names)(new)))
        keyed: object = members.get("state") if "param_groups" in members else None
        target: Callable[[str], str | None] = changed.get
        if any(key.startswith("param_groups.") for key in members):
            keyed, target = node, partial(_flattened, changed)
        if not isinstance(keyed, (InertDict, Object)) or mapping_items(keyed) is None:
            continue
        if new := _changed([key for key, _ in keyed.pairs], target):
            keys.append((keyed, new))
    if not sequences and not keys:
        return rest
    mapped = TreeMap(lambda leaf: leaf, sequences)
    rest = mapped(rest)
    for old, names in keys:
        copy = mapped(old)
        if isinstance(copy, (InertDict, Object)):
            copy.pairs = [(name, value) for name, (_, value) in zip(names, copy.pairs, strict=True)]
    return rest


def _changed(names: Sequence[object], new: Callable[[str], str | None]) -> list[object] | None:
    """The names, those that become others changed; ``None``: none does.

    Raises:
        KeyCollisionError: two would become one.
    """
    found = [new(name) if isinstance(name, str) else None for name in names]
    if all(target is None for target in found):
        return None
    changed = [name if target is None else target for name, target in zip(names, found, strict=True)]
    came_from: dict[str, str] = {}
    for name, target in zip(names, changed, strict=True):
        if isinstance(name, str) and isinstance(target, str) and came_from.setdefault(target, name) != name:
            raise KeyCollisionError(came_from[target], name, target)
    return changed


def _flattened(changed: Mapping[str, str], key: str) -> str | None:
    """The new form of a key of a flattened optimizer (``flatten_optimizer_state_dict``): ``state.NAME.exp_avg``."""
    kind, _, rest = key.partition(".")
    name, _, last = rest.rpartition(".")
    return f"{kind}.{changed[name]}.{last}" if kind in ("state", "param_groups") and name in changed else None


def wrapper_versions(path: str) -> dict[str, object]:
    """The entries of ``_metadata`` for the modules above ``path``, as torch writes them for version 1."""
    steps = path.split(".") if path else []
    return {".".join(steps[:depth]): InertDict([("version", 1)]) for depth in range(len(steps))}


def module_paths(name: str) -> Iterator[str]:
    """The paths of the modules that a name is below, outermost first; the root is left out."""
    end = name.find(".")
    for _ in range(_MAX_LEVELS):
        if end < 0:
            return
        yield name[:end]
        end = name.find(".", end + 1)


def moved_versions(
    versions: Mapping[str, object], targets: Mapping[str, str], rename: Callable[[str], str]
) -> dict[str, object]:
    """Module versions under the paths that modules have after their tensors were renamed.

    Where ``a.b.weight`` became ``x.b.weight``, module ``a`` became ``x``, and ``a.b`` became ``x.b``. Where the names
    below a module do not agree on it, or there are none, its path is renamed like a name; where that changes nothing it
    goes where the names, each with as many segments taken off its end as was below the module, agree that it went, and
    with nothing below it with the module it is in.  The root stays the root unless everything moved.

    Args:
        versions: by old path.
        targets: from the old to the new name of everything in the state_dict.
        rename: from old name to new name; for paths that become no path its result is not used.
    """
    votes = {path: _Votes() for path in versions}
    for name, new in targets.items():
        for path in ("", *module_paths(name)):
            if path in votes:
                votes[path].add(name[len(path) + 1 :] if path else name, new)
    moved: dict[str, str] = {}
    best: dict[str, tuple[bool, int, str]] = {}
    for path in sorted(versions, key=len):  # a module's parent goes before it
        vote = votes[path]
        everything = vote.exactly == len(targets)
        if path == "":
            moved[path] = (vote.exact or "") if everything else ""
        else:
            moved[path] = _moved_path(path, vote, moved, rename) if vote.exact is None else vote.exact
        # Of modules that fall together those whose names say so count, and of several the inner one;
        # but of those that fall to the root, where it has other tensors too, none.
        strays = moved[path] == "" != path and not everything
        rank = (vote.exact is not None and not strays, -1 if strays else len(path), path)
        best[moved[path]] = max(best.get(moved[path], rank), rank)
    kept = {path for _, _, path in best.values()}
    found = {moved[path]: entry for path, entry in versions.items() if path in kept}
    return {**wrapper_versions(moved.get("", "")), **found}


def _moved_path(path: str, vote: _Votes, moved: Mapping[str, str], rename: Callable[[str], str]) -> str:
    """Where a module went whose names do not agree on it."""
    wanted = rename(path)
    if wanted != path and all(wanted.split(".")):
        return wanted
    if vote.asked:
        return vote.loose or path
    parent, _, last = path.rpartition(".")
    above = moved.get(parent, parent)
    return f"{above}.{last}" if above else last


class _Votes:
    """The new places of a module according to the names below it."""

    __slots__ = ("_exact", "_loose", "asked", "exactly")

    def __init__(self) -> None:
        self.asked = 0
        self.exactly = 0
        self._exact: set[str] = set()
        self._loose: set[str] = set()

    def add(self, below: str, new: str) -> None:
        """A name's part below the module, and the whole new name."""
        self.asked += 1
        if new == below or new.endswith(f".{below}"):
            self.exactly += 1
            self._exact.add(new[: -len(below) - 1] if len(below) < len(new) else "")
        segments = below.count(".") + 1
        self._loose.add(new.rsplit(".", segments)[0] if new.count(".") >= segments else "")

    @property
    def exact(self) -> str | None:
        """Where it went by the names that end as before; ``None``: none does, or they do not agree."""
        return next(iter(self._exact)) if len(self._exact) == 1 else None

    @property
    def loose(self) -> str:
        """Where it went by the number of segments; ``""``: the names do not agree."""
        return next(iter(self._loose)) if len(self._loose) == 1 else ""
