"""Fleets: ``ckptkit check`` of a thousand and of ten thousand small files, in one process and in two.

They stand beside ``picklescan`` over the same folder, where it is given; it looks at the names in the pickles alone,
in one process.  The ten thousand are copies of the thousand.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import checking
from measure import CKPTKIT, Command, Groups

COPIES = 10

JOBS = (1, 2)


def make(folder: Path) -> list[Path]:
    """The folders of small files."""
    place = folder / "fleet"
    place.mkdir()
    few, _ = checking.make_many(place)
    many = place / "copies"
    for copy in range(COPIES):
        shutil.copytree(few, many / str(copy))
    return [few, many]


def groups(folders: list[Path], picklescan: Path | None) -> Groups:
    """A table for each folder; the baseline is one process."""
    found: Groups = {}
    for folder in folders:
        count = sum(path.is_file() for path in folder.rglob("*"))
        commands = [
            Command(f"check --jobs {jobs}", [*CKPTKIT, "check", str(folder), "--jobs", str(jobs)]) for jobs in JOBS
        ]
        if picklescan is not None:
            commands.append(Command("picklescan", [str(picklescan), "-p", str(folder)]))
        found[f"Checking {count:,} files of 12 kB in several processes"] = (commands[0].name, commands)
    return found
