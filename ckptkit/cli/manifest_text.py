"""What became of a manifest, for people."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.cli.options import Style, printable
from ckptkit.formats.folder import told as passed_over
from ckptkit.released.manifests.records import FileRecord, Manifest
from ckptkit.report import count_of, human_size

__all__ = ["summary"]

_MARKS = (("added", "+", "green"), ("changed", "~", "yellow"), ("removed", "-", "red"))

_SHOWN_DIGITS = 12
"""Of a content digest: enough to tell files apart."""


def summary(manifest: Manifest, destination: str, style: Style) -> Iterator[str]:
    """One line for each file that was added, changed or removed, and one for all."""
    records = {record.path: record for record in manifest.files}
    told = []
    for name, mark, color in _MARKS:
        paths: tuple[str, ...] = getattr(manifest.changes, name)
        for path in paths:
            record = records.get(path)
            about = f"  {_about(record)}" if record is not None else ""
            yield f"{style(mark, fg=color)} {printable(path)}{about}"
        if paths:
            told.append(f"{len(paths):,} {name}")
    if manifest.changes.kept:
        told.append(f"{len(manifest.changes.kept):,} unchanged")
    if manifest.passed_over:
        yield passed_over(manifest.passed_over)
    yield f"{printable(destination)}: {count_of(len(records), 'file')} ({', '.join(told)})"


def _about(record: FileRecord) -> str:
    parts = [record.format, human_size(record.size), record.architecture or record.kind]
    if record.trust != "safe":
        parts.append(record.trust)
    if record.content_digest is not None:
        parts.append(record.content_digest[: len("sha256:") + _SHOWN_DIGITS] + "…")
    return printable(", ".join(parts))
