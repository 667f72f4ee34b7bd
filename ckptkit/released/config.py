"""The configuration of ``ckptkit check``: a policy for all files, and others for some.

It is the table ``[tool.ckptkit]`` of a ``pyproject.toml``, or the whole of a ``ckptkit.toml``; of the two in one
folder the second is taken.  The first found is taken from the working directory upward::

    paths = ["weights"]                  # what is checked where nothing is named; relative to this file
    manifest = "weights/weights.lock.json"
    no-pickle = true
    max-size = "2GB"
    allow-dtype = ["float32", "float16"]

    [[overrides]]                        # the last that matches a file and sets a key decides
    files = ["*.bin", "legacy/*.pth"]    # with a slash: the path from this file's folder; without: the name
    no-pickle = false

An override can be written as a table named by its glob, too: ``[overrides."*.bin"]``; and all of it can be in a table
``check``, for those who like it apart.  Keys are the options' names, with ``-`` or ``_``.  An unknown key is an error:
a misspelled policy that is ignored would let everything pass.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import field
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from ckptkit import places
from ckptkit.errors import FileAccessError, FormatError, LimitError, MissingFileError, VerifyError
from ckptkit.nearness import meant_file
from ckptkit.released.policy import POLICY_KEYS, Policy, close_match
from ckptkit.startup import dataclass

__all__ = ["Config", "Override", "find_config", "read_config"]

CONFIG_NAME, PROJECT_NAME = "ckptkit.toml", "pyproject.toml"

_MAX_NBYTES = 4 << 20
"""Bytes of a configuration file; the largest ``pyproject.toml`` of real projects have some 100 kB."""

_OWN_KEYS = ("paths", "manifest", "overrides")


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Settings for the files that match.

    Attributes:
        files: globs.
        settings: fields of a `Policy` and their values.
    """

    files: tuple[str, ...]
    settings: Mapping[str, Any]

    def matches(self, path: str) -> bool:
        """Whether it is for this file; the path is relative to the configuration's folder, with slashes."""
        name = path.rpartition("/")[2]
        return any(fnmatchcase(path if "/" in glob else name, glob.removeprefix("./")) for glob in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What is configured, and what was typed, which wins.

    Attributes:
        path: the file; ``None``: there is none.
        paths: what to check if nothing is named: paths, and URLs.
        manifest: the manifest's path.
        settings: fields of the `Policy` for all files.
        overrides: those for some.
        typed: fields that were given with the command or the call, for all files.
    """

    path: str | None = None
    paths: tuple[str, ...] = ()
    manifest: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    typed: Mapping[str, Any] = field(default_factory=dict)
    _policies: dict[tuple[int, ...], Policy] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Those made so far, by the overrides that they have."""

    @property
    def needs_model(self) -> bool:
        """Whether some file may be checked against a model."""
        return any(settings.get("fits") is not None or settings.get("forward") for settings in self._every)

    @property
    def every_pickle(self) -> bool:
        """Whether every pickle of some file counts; see `Policy.every_pickle`."""
        return any(settings.get("no_pickle") or settings.get("max_trust") is not None for settings in self._every)

    @property
    def _every(self) -> list[Mapping[str, Any]]:
        return [self.settings, self.typed, *(override.settings for override in self.overrides)]

    def policy_for(self, path: str) -> Policy:
        """The policy that a file must meet.

        Args:
            path: the file, from the working directory.
        """
        overrides = self._overriding(path)
        if overrides not in self._policies:
            found = {key: value for i in overrides for key, value in self.overrides[i].settings.items()}
            self._policies[overrides] = Policy(**{**self.settings, **found, **self.typed})
        return self._policies[overrides]

    def _overriding(self, path: str) -> tuple[int, ...]:
        """Which of the overrides are for a file."""
        if not self.overrides or self.path is None:
            return ()
        folder = os.path.dirname(os.path.abspath(self.path))
        try:
            relative = os.path.relpath(os.path.abspath(path), folder)
        except ValueError:  # another drive
            relative = os.path.abspath(path)
        name = places.shown(path) if places.is_url(path) else relative.replace(os.sep, "/")
        return tuple(i for i, override in enumerate(self.overrides) if override.matches(name))


def find_config(folder: str) -> str | None:
    """The configuration that holds in a folder: the nearest from there upward, named as seen from it.

    Raises:
        FormatError: a ``pyproject.toml`` on the way is not valid TOML.
        FileAccessError: it cannot be read.
    """
    start = folder = os.path.abspath(folder)
    while True:
        own, project = os.path.join(folder, CONFIG_NAME), os.path.join(folder, PROJECT_NAME)
        if os.path.isfile(own):
            return os.path.relpath(own, start)
        if os.path.isfile(project) and "ckptkit" in _table(_parsed(project), "tool", project):
            return os.path.relpath(project, start)
        above = os.path.dirname(folder)
        if above == folder:
            return None
        folder = above


def read_config(path: str) -> Config:
    """Read a configuration.

    Args:
        path: the file; one named ``pyproject.toml`` holds it under ``[tool.ckptkit]``.

    Raises:
        MissingFileError, FileAccessError: it cannot be read.
        FormatError: it is not valid TOML, or has an unknown key or an invalid value.
    """
    table, name = _parsed(path), ""
    if os.path.basename(path) == PROJECT_NAME:
        table, name = _table(_table(table, "tool", path), "ckptkit", path, "tool."), "tool.ckptkit"
    if "check" in table:
        if len(table) > 1:
            beside = next(key for key in table if key != "check")
            raise FormatError(
                f"{_shown(name)} has {beside!r:.80} beside a table check; put all of it into that table, or none",
                path=path,
            )
        table, name = _table(table, "check", path, f"{name}." * bool(name)), f"{name}.check".lstrip(".")
    settings = _settings(table, path, name, (*POLICY_KEYS, *_OWN_KEYS))
    folder = os.path.dirname(path)
    manifest = settings.pop("manifest", None)
    if manifest is not None and (not isinstance(manifest, str) or not manifest):
        raise _wrong(path, name, "manifest", manifest, "the path of a file")
    paths = _texts(settings.pop("paths", []), path, name, "paths")
    overrides = tuple(_overrides(settings.pop("overrides", []), path, f"{name}.overrides".lstrip(".")))
    config = Config(
        path=path,
        paths=tuple(each if places.is_url(each) else os.path.join(folder, each) for each in paths),
        manifest=manifest if manifest is None or places.is_url(manifest) else os.path.join(folder, manifest),
        settings=settings,
        overrides=overrides,
    )
    _require_sound(settings, path, name)
    return config


def _overrides(given: object, path: str, name: str) -> Iterator[Override]:
    """Those of a list of tables, or of a table of tables by glob."""
    if isinstance(given, list) and all(isinstance(each, dict) for each in given):
        for i, each in enumerate(given):
            yield _override(each, path, f"{name}[{i}]")
    elif isinstance(given, dict) and all(isinstance(each, dict) for each in given.values()):
        for glob, each in given.items():
            if "files" in each:
                raise FormatError(f"[{name}.{glob!r:.80}] has files, but its name is already the glob", path=path)
            yield _override({**each, "files": [glob]}, path, f"{name}.{glob!r:.80}")
    else:
        raise FormatError(f"{name} = {given!r:.80}; expected tables [[{name}]]", path=path)


def _override(table: dict[str, Any], path: str, name: str) -> Override:
    settings = _settings(table, path, name, ("files", *POLICY_KEYS))
    files = _texts(settings.pop("files", []), path, name, "files")
    if not files:
        raise FormatError(f"[{name}] names no files; expected files = [globs]", path=path)
    _require_sound(settings, path, name)
    return Override(files=files, settings=settings)


def _settings(table: dict[str, Any], path: str, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The table with its keys as fields are named."""
    _require_known(table, known, path, _shown(name))
    settings: dict[str, Any] = {}
    for key, value in table.items():
        bare = key.replace("-", "_")
        if bare in settings:
            raise FormatError(f"{_shown(name)} has {key!r} twice, with - and with _", path=path)
        settings[bare] = value
    return settings


def _shown(name: str) -> str:
    """A table as written; the file itself has no name."""
    return f"[{name}]" if name else "the file"


def _require_known(table: Mapping[str, Any], known: tuple[str, ...], path: str, where: str) -> None:
    for key in table:
        if key.replace("_", "-") not in known:
            raise FormatError(f"{where} has an unknown key {key!r:.80}; {close_match(key, known)}", path=path)


def _require_sound(settings: Mapping[str, Any], path: str, name: str) -> None:
    try:
        Policy(**settings)
    except VerifyError as error:
        raise FormatError(f"{_shown(name)}: {error}", path=path) from None


def _texts(given: object, path: str, name: str, key: str) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _wrong(path, name, key, given, "a list of strings")
    return tuple(texts)


def _wrong(path: str, name: str, key: str, given: object, expected: str) -> FormatError:
    return FormatError(f"{_shown(name)}: {key} = {given!r:.80}; expected {expected}", path=path)


def _table(document: Mapping[str, Any], key: str, path: str, place: str = "") -> dict[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise FormatError(f"{place}{key} is {type(table).__name__}; expected a table", path=path)
    return table


def _parsed(path: str) -> dict[str, Any]:
    tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - small, and ours
            content = file.read(_MAX_NBYTES + 1)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file{meant_file(path)}", path=path) from None
    except OSError as error:
        raise FileAccessError(f"{path}: {error.strerror or error}", path=path) from error
    if len(content) > _MAX_NBYTES:
        raise LimitError("bytes of a configuration", limit=_MAX_NBYTES, actual=len(content)).at(path=path)
    try:
        parsed = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise FormatError(f"is not valid TOML: {error}", path=path) from None
    return dict(parsed)
