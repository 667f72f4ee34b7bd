"""Makes a manifest where it is asked for: from paths as people type them, to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptkit.errors import DestinationExistsError, FileAccessError, RewriteError
from ckptkit.released.manifests.maker import make, write
from ckptkit.released.manifests.reader import read_manifest
from ckptkit.released.manifests.records import Digests, Manifest
from ckptkit.released.selection import Selected, name_of, select
from ckptkit.report import count_of

__all__ = ["make_at"]

Golden = Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str] | None


def make_at(
    paths: Sequence[str],
    destination: str | None,
    *,
    digests: Digests | None,
    golden: Golden,
    allow_part: bool,
    update: bool,
    force: bool,
    ignore_checksums: bool = False,
) -> Manifest:
    """As `ckptkit.manifest`."""
    if digests not in (None, "total", "tensor"):
        raise RewriteError(f"digests is {digests!r:.40}; expected 'total' or 'tensor'")
    if update and destination is None:
        raise FileAccessError("there is no manifest to update; name it with -o")
    folder = _folder_of(paths) if destination is None else os.path.dirname(os.path.abspath(destination))
    there = destination is not None and os.path.lexists(destination)
    if destination is not None and there and not (update or force):
        raise DestinationExistsError(
            f"{destination}: exists already; --update renews what has changed in it, --force makes it anew"
        )
    previous = read_manifest(destination) if destination is not None and there and update else None
    paths = paths or (_paths_of(previous, folder) if update else ())
    selection = select(paths, relative_to=folder, manifest=destination)
    selection.require_all()
    selected = selection.checkpoints
    manifest = make(
        selected,
        folder=folder,
        folders=[_claimed(name_of(path, folder)) for path in paths if os.path.isdir(path)],
        digests=digests,
        golden=_goldens(golden, selected, folder),
        allow_part=allow_part,
        previous=previous,
        ignore_checksums=ignore_checksums,
    )
    if destination is not None and (
        previous is None or (previous.files, previous.folders) != (manifest.files, manifest.folders)
    ):
        write(manifest, destination, force=there)
    return replace(manifest, passed_over=selection.passed_over)


def _paths_of(previous: Manifest | None, folder: str) -> list[str]:
    """What a manifest was made of, as far as it is there; what is yet to be made, of its own folder."""
    if previous is None:
        return [folder]
    names = [*previous.folders, *(record.path for record in previous.files)]
    paths = [os.path.join(folder, *name.split("/")) for name in names]
    return [path for path in paths if os.path.lexists(path)]


def _claimed(name: str) -> str:
    """A folder as the manifest names it: one above its own is no more than its own."""
    return "." if name.split("/")[0] == ".." else name


def _folder_of(paths: Sequence[str]) -> str:
    """The working directory; where files lie elsewhere, the folder they have in common."""
    folder = os.getcwd()
    if not any(name_of(path, folder).startswith("../") for path in paths):
        return folder
    try:
        return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    except ValueError:  # several drives
        return folder


def _goldens(golden: Golden, selected: Sequence[Selected], folder: str) -> dict[str, str]:
    """Golden files by the names of their checkpoints, both relative to the manifest's folder."""
    if golden is None:
        return {}
    if isinstance(golden, Mapping):
        return {name_of(path, folder): name_of(os.fsdecode(file), folder) for path, file in golden.items()}
    name = name_of(os.fsdecode(golden), folder)
    checkpoints = [each.name for each in selected if each.name != name]
    if len(checkpoints) != 1:
        raise FileAccessError(
            f"{os.fsdecode(golden)}: belongs to one of {count_of(len(checkpoints), 'checkpoint')}; say to which: "
            "FILE=GOLDEN"
        )
    return {checkpoints[0]: name}
