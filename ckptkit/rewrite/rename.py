r"""Renaming: prefixes of whole leading segments stripped and added, and rules of regular expressions.

Names are dotted paths.  A prefix is stripped only if it is a leading run of whole segments: ``mlp_module.layer`` does
not begin with ``module.``, and a name without the prefix does not change. The module versions (``_metadata``) and the
names an optimizer keeps its state by, or beside it (``param_names``), move along with the names they belong to.

A rule is a regular expression and a replacement, as ``re.sub`` takes them: the expression is searched for
anywhere in a name, and the replacement may hold ``\1`` and ``\g<name>``.

In Python, a dict or a function can rename too; it applies to whole names, which are not expressions.

As text a rule is ``REGEX=>REPLACEMENT``, split at the first ``=>``.  Nothing is stripped: spaces around the arrow
belong to the rule.  An expression that must contain ``=>`` itself writes ``=\>``. A file of rules has one per line;
empty lines and lines that begin with ``#`` are skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckptkit.arguments import several
from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import FileAccessError, MissingFileError, RewriteError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.nearness import did_you_mean, meant_file
from ckptkit.normalize.modules import MODULE, unwrapped, unwrapped_path
from ckptkit.report import count_of, listed
from ckptkit.rewrite.names import moved_versions, renamed, wrapper_versions
from ckptkit.startup import dataclass, sha256

__all__ = ["AddModule", "AddPrefix", "Rename", "StripModule", "StripPrefix", "parse_rule", "read_rules"]


@dataclass(frozen=True, slots=True)
class StripModule:
    """Remove every wrapper prefix from the names: ``module.``, ``_orig_mod.`` and others, nested in any order.

    `ckptkit.normalize.modules` defines wrapper prefixes.  Names without one do not change, so it is safe to apply
    twice.

    Raises (when applied):
        KeyCollisionError: two names would become one.
    """

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``."""
        return unwrapped(name)

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        return _renamed(checkpoint, unwrapped, unwrapped_path)


@dataclass(frozen=True, slots=True)
class _OfPrefix:
    prefix: str

    def __post_init__(self) -> None:
        _require(self.prefix)


@dataclass(frozen=True, slots=True)
class StripPrefix(_OfPrefix):
    """Strip one leading ``prefix`` from the names that have it.

    Args:
        prefix: one or more whole segments; ``"module"`` and ``"module."`` mean the same.

    Raises:
        RewriteError: the prefix is empty.
        KeyCollisionError: (when applied) two names would become one.
    """

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``."""
        return name.removeprefix(self.prefix.rstrip(".") + ".")

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        dotted = self.prefix.rstrip(".") + "."

        def strip_path(path: str) -> str:
            # The modules that the prefix names fall together with the root, unless they keep other tensors.
            if not dotted.startswith(path + "."):
                return self.rename(path)
            names = checkpoint.state_dict.everything
            keeps = any(name.startswith(path + ".") and not name.startswith(dotted) for name in names)
            return path if keeps else ""

        return _renamed(checkpoint, self.rename, strip_path)


@dataclass(frozen=True, slots=True)
class AddPrefix(_OfPrefix):
    """Put ``prefix`` before every name.

    Args:
        prefix: one or more whole segments; ``"module"`` and ``"module."`` mean the same.

    Raises:
        RewriteError: the prefix is empty.
    """

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``."""
        return f"{self.prefix.rstrip('.')}.{name}"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        bare = self.prefix.rstrip(".")
        versions = checkpoint.state_dict.versions
        if versions is not None:
            inner = {f"{bare}.{path}" if path else bare: entry for path, entry in versions.items()}
            versions = {**wrapper_versions(bare), **inner}
        return renamed(checkpoint, self.rename, versions)


@dataclass(frozen=True, slots=True)
class AddModule:
    """Put ``module.`` before every name, as when a model inside DataParallel is saved."""

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``."""
        return f"{MODULE}.{name}"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        return AddPrefix(MODULE)(checkpoint)


def _require(prefix: str) -> None:
    if not prefix.strip("."):
        raise RewriteError(f"the prefix {prefix!r} is empty; give at least one segment, such as 'module.'")


def _renamed(checkpoint: Checkpoint, rename: Callable[[str], str], rename_path: Callable[[str], str]) -> Checkpoint:
    """The checkpoint with tensor names, and what goes by them, renamed."""
    versions = checkpoint.state_dict.versions
    return renamed(checkpoint, rename, None if versions is None else _renamed_versions(versions, rename_path))


def _renamed_versions(versions: Mapping[str, object], rename_path: Callable[[str], str]) -> dict[str, object]:
    """Module paths renamed.  Where a wrapper and what it wraps fall together the inner one counts."""
    origin: dict[str, str] = {}
    for path in versions:
        target = rename_path(path)
        if target not in origin or len(path) > len(origin[target]):
            origin[target] = path
    return {target: versions[path] for target, path in origin.items()}


_ARROW = "=>"

_MAX_NAMES = 64
"""Names of a dict that a receipt lists."""

_MAX_SHOWN = 200
"""Characters of an expression, a replacement or a name in a message."""


Renaming = str | Sequence[str | tuple[str, str]] | Mapping[str, str] | Callable[[str], str]
"""A specification of how to rename; see `Rename`."""


@dataclass(frozen=True, slots=True)
class Rename:
    r"""Rename tensors by rules, each applied to the result of the one before; by a dict; or by a function.

    The module versions follow the names of the tensors below them; see
    `ckptkit.rewrite.names.moved_versions`.

    Args:
        rules: pairs of a regular expression and its replacement, as for ``re.sub``, or ``"REGEX=>REPLACEMENT"``, one
            or several.  Or a dict from whole names to their new ones, all at once: ``{"a": "b", "b": "a"}`` swaps
            two.  Or a function from each name to its new one (the same, to keep it); it may be asked several times.

    Raises:
        RewriteError: an expression or replacement is invalid; a name in the dict is not text; (when applied) a name
            would be empty, the checkpoint lacks names in the dict, or the function does not return text.
        KeyCollisionError: (when applied) two names would be the same.
    """

    rules: Renaming

    def __post_init__(self) -> None:
        if callable(self.rules):
            return
        if isinstance(self.rules, Mapping):
            pairs: dict[Any, Any] = dict(self.rules)
            object.__setattr__(self, "rules", pairs)
            for old, new in pairs.items():
                if not isinstance(old, str) or not isinstance(new, str):
                    raise RewriteError(f"Rename: {old!r:.80}: {new!r:.80} is not a pair of an old name and a new name")
            return
        given = [parse_rule(rule) if isinstance(rule, str) else rule for rule in several(self.rules)]
        object.__setattr__(self, "rules", tuple((pattern, replacement) for pattern, replacement in given))
        for pattern, replacement in self._expressions:
            try:
                # A replacement is read before anything is searched for, so its errors show here.
                re.compile(pattern).sub(replacement, "")
            except (re.error, IndexError, OverflowError, RecursionError) as error:
                where = "replacement" if _compiles(pattern) else "regular expression"
                reason = str(error) or type(error).__name__
                raise RewriteError(f"rule {_shown(pattern, replacement)}: bad {where}: {reason}") from None

    def __repr__(self) -> str:
        """For receipts, which the header of each output contains: for a large dict its digest."""
        rules = self.rules
        if isinstance(rules, Mapping) and len(rules) > _MAX_NAMES:
            digest = sha256(repr(sorted(rules.items())).encode("utf-8", "surrogatepass")).hexdigest()
            return f"Rename(rules=<dict of {count_of(len(rules), 'name')}, SHA-256 {digest}>)"
        return f"Rename(rules={rules!r})"

    @property
    def _expressions(self) -> tuple[tuple[str, str], ...]:
        """The rules, if they are pairs; a dict or a function has none."""
        return () if callable(self.rules) or isinstance(self.rules, Mapping) else self.rules  # type: ignore[return-value]

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``.

        Raises:
            RewriteError: it would be empty, or is not text.
        """
        if callable(self.rules):
            found: object = self.rules(name)
            if not isinstance(found, str):
                raise RewriteError(
                    f"Rename: {_called(self.rules)} returned {found!r:.80} for the name {name[:_MAX_SHOWN]!r}; "
                    "expected its new name, or the same name",
                    names=(name,),
                )
            new, emptied = found, _called(self.rules) if name and not found else None
        elif isinstance(self.rules, Mapping):
            new = self.rules.get(name, name)
            emptied = "the dict" if name and not new else None
        else:
            new, rule = self._applied(name)
            emptied = None if rule is None else f"rule {_shown(*rule)}"
        if emptied is not None:
            raise RewriteError(f"{emptied} leaves the name {name[:_MAX_SHOWN]!r} empty", names=(name,))
        return new

    def _applied(self, name: str) -> tuple[str, tuple[str, str] | None]:
        """The new name, and if nothing is left of it the rule that removed the last of it."""
        emptied = None
        for pattern, replacement in self._expressions:
            new = re.sub(pattern, replacement, name)
            if not new and name:
                emptied = pattern, replacement
            name = new
        return name, None if name else emptied

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        names = checkpoint.state_dict.everything
        if isinstance(self.rules, Mapping):
            self._require(names)
        targets = {name: self.rename(name) for name in names}
        versions = checkpoint.state_dict.versions
        if versions is not None:
            versions = moved_versions(versions, targets, lambda path: self._applied(path)[0])
        return renamed(checkpoint, targets.__getitem__, versions)

    def _require(self, names: Mapping[str, object]) -> None:
        """See that each name of the dict is there."""
        lacking = [name for name in self.rules if name not in names]  # type: ignore[union-attr]
        if lacking:
            meant = did_you_mean(str(lacking[0]), names, 1, shown=repr)
            raise RewriteError(
                f"Rename: {count_of(len(lacking), 'name')} in the dict {'is' if len(lacking) == 1 else 'are'} not in "
                f"the state_dict: {listed([repr(name)[:_MAX_SHOWN] for name in lacking], 8)}{meant}",
                names=map(str, lacking),
            )


def _called(function: Callable[..., object]) -> str:
    return f"{getattr(function, '__qualname__', type(function).__name__)}()"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _shown(pattern: str, replacement: str) -> str:
    """A rule in a message, as it was typed: a ``repr`` would double its backslashes."""
    return f"'{pattern[:_MAX_SHOWN]}{_ARROW}{replacement[:_MAX_SHOWN]}'"


def parse_rule(text: str) -> tuple[str, str]:
    """The regular expression and the replacement of a rule ``REGEX=>REPLACEMENT``.

    Raises:
        RewriteError: there is no ``=>``, nothing before it, or what is there is no rule.
    """
    pattern, arrow, replacement = text.partition(_ARROW)
    if not arrow or not pattern:
        missing = "no regular expression before '=>'" if arrow else "no '=>'"
        raise RewriteError(
            f"rule '{text[:_MAX_SHOWN]}' has {missing}; expected 'REGEX=>REPLACEMENT', such as '^model\\.=>encoder.'"
        )
    Rename(((pattern, replacement),))  # raises
    return pattern, replacement


def read_rules(path: str | os.PathLike[str]) -> tuple[tuple[str, str], ...]:
    """The rules of a file: UTF-8 text, one ``REGEX=>REPLACEMENT`` a line.

    Raises:
        FileAccessError: it cannot be read, or is larger than any file of rules.
        RewriteError: it is not UTF-8, or a line is not a rule; the message names file and line.
    """
    from pathlib import Path

    name, most = os.fsdecode(path), DEFAULT_LIMITS.index_nbytes
    try:
        with Path(name).open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise MissingFileError(f"{name}: no such file{meant_file(name)}", path=name) from None
    except (OSError, ValueError) as error:
        raise FileAccessError(
            f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}", path=name
        ) from error
    if len(data) > most:
        raise FileAccessError(
            f"{name}: is larger than {most:,} bytes; a file of rules has one rule per line", path=name
        )
    rules = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            line = raw.removesuffix(b"\r").decode("utf-8")
            if line.strip() and not line.startswith("#"):
                rules.append(parse_rule(line))
        except UnicodeDecodeError as error:
            raise RewriteError(
                f"{name}, line {number}: is not UTF-8: byte {error.start} of the line", path=name
            ) from None
        except RewriteError as error:
            raise RewriteError(f"{name}, line {number}: {error}", path=name) from None
    return tuple(rules)
