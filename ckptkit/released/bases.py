"""Which folder the paths of a manifest are relative to: its own, or the URL that it was made from.

A manifest of local files is in their folder or above it.  A manifest of files at URLs cannot be: it records where it
was made (its ``origin``) and is checked against that prefix, or against a copy anywhere.  Then the given path means the
folder, and files are identified by their paths below it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ckptkit import places
from ckptkit.errors import FileAccessError, VerifyError
from ckptkit.released.manifest_file import Manifest

__all__ = ["based", "common_folder", "require_one_place", "url_of"]


def require_one_place(paths: Sequence[str]) -> bool:
    """Whether what is recorded, or checked against a record, is at URLs: all of it, or nothing.

    Raises:
        VerifyError: some of it does.
    """
    far = [path for path in paths if places.is_url(path)]
    if far and len(far) < len(paths):
        raise VerifyError(
            "all files of a manifest must be below one folder: give URLs or local paths, not both "
            f"({places.shown(far[0])} and {next(path for path in paths if path not in far)})"
        )
    return bool(far)


def url_of(folder: str) -> str | None:
    """A folder, if it is a URL."""
    return places.shown(folder) if places.is_url(folder) else None


# A manifest that is made.


def common_folder(paths: Sequence[str]) -> str:
    """The folder that files are recorded relative to where nothing else says so.

    For local paths it is the working directory, or if files are elsewhere the folder they have in common; for URLs
    their common folder.
    """
    if require_one_place(paths):
        return _common_url(paths)
    folder = os.getcwd()
    if not any(places.relative(path, folder).startswith("../") or _is_one(path, folder) for path in paths):
        return folder
    try:
        return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    except ValueError:  # several drives
        return folder


def _is_one(path: str, folder: str) -> bool:
    """Whether a folder is itself the checkpoint to record: then the manifest is beside it."""
    return places.relative(path, folder) == "." and places.isdir(path) and _is_sharded(path)


def _is_sharded(folder: str) -> bool:
    from ckptkit.formats.distributed.around import sharded_at

    return sharded_at(folder) is not None


def _common_url(paths: Sequence[str]) -> str:
    folders = [_folder_of(path) for path in paths]
    common = folders[0].split("/")
    for folder in folders[1:]:
        same = [one == other for one, other in zip(common, folder.split("/"), strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    if len(common) < 3 or not common[2]:  # scheme, nothing, who has it
        raise FileAccessError(
            f"{places.shown(paths[0])}: has no folder in common with the others: all files of a manifest must be "
            "below one URL"
        )
    return "/".join(common)


def _folder_of(path: str) -> str:
    """The folder for a path: itself, if it contains any checkpoints."""
    path = path.rstrip("/") if places.isdir(path) else path
    return path if places.isdir(path) and not _is_sharded(path) else places.split(path)[0]


# A manifest that files are checked against.


def based(manifest: Manifest, path: str, paths: Sequence[str]) -> Manifest:
    """A manifest whose ``folder`` is the one for its files, and ``beside`` its own.

    Args:
        manifest: as it was read.
        path: of the manifest; messages use paths as given, not from the root of the disk.
        paths: to check against it; none: its origin, or its own folder if its files are there.

    Raises:
        VerifyError: some of the paths are URLs and others are not.
    """
    own = places.split(path)[0]
    is_far = require_one_place(paths)
    manifest = replace(manifest, folder=own, beside=own)
    if not is_far and manifest.origin is None:
        return manifest
    if not paths:
        is_beside = any(places.exists(places.below(own, name)) for name in manifest.paths)
        return manifest if is_beside or manifest.origin is None else replace(manifest, folder=manifest.origin)
    for each in (manifest, _of_its_folder(manifest)):
        for base in _bases(each, paths[0]) if each is not None else ():
            if not any(places.is_url(places.relative(path, base)) for path in paths):
                return replace(each or manifest, folder=base)
    return replace(manifest, folder=paths[0] if places.isdir(paths[0]) else places.split(paths[0])[0])


def _of_its_folder(manifest: Manifest) -> Manifest | None:
    """The manifest with the paths below the one folder that it was made from; ``None``: it was not made from one."""
    if len(manifest.folders) != 1:
        return None
    start = f"{manifest.folders[0]}/"
    if not all(record.path.startswith(start) for record in manifest.files):
        return None
    files = tuple(replace(record, path=record.path[len(start) :]) for record in manifest.files)
    return replace(manifest, files=files, folders=(".",))


def _bases(manifest: Manifest, path: str) -> Iterator[str]:
    """Folders that paths of a manifest may be relative to, the likeliest first."""
    if manifest.origin is not None and places.is_url(path):
        yield manifest.origin
    names = manifest.paths
    is_folder = places.isdir(path)
    whole = path.rstrip("/") if places.is_url(path) else os.path.normpath(path)
    above = reversed([*_above(whole)])
    if not is_folder:
        yield from (folder for folder in above if places.relative(whole, folder) in names)
        return
    shares = {folder: _share_there(folder, whole, names) for folder in (whole, *above)}
    yield from sorted((folder for folder, share in shares.items() if share), key=lambda folder: -shares[folder])


def _share_there(folder: str, path: str, names: set[str]) -> float:
    """How much is there of what a manifest names below a path, if its paths are relative to a folder."""
    name = places.relative(path, folder)
    meant = [each for each in names if name in (".", each) or each.startswith(f"{name}/")]
    return sum(places.exists(places.below(folder, each)) for each in meant) / max(len(meant), 1)


def _above(path: str) -> Iterator[str]:
    """The folders above a path, the nearest first."""
    while True:
        folder, name = places.split(path)
        if not name or folder == path:
            return
        yield folder
        path = folder
