"""``ckptkit manifest PATH... -o FILE``: record what released weights must be.

What became of a manifest, for people.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import click

from ckptkit import api
from ckptkit.cli import ending
from ckptkit.cli.options import (
    Style,
    allow_part_option,
    common_options,
    echo,
    echo_json,
    ignore_checksums,
    json_errors,
    path_argument,
    printable,
    styler,
    with_examples,
)
from ckptkit.formats.folder import passed_over_text
from ckptkit.released.manifest_file import FileRecord, Manifest
from ckptkit.report import count_of, human_size

__all__ = ["command", "summary"]


@click.command(
    "manifest",
    epilog=with_examples(
        "ckptkit manifest weights/ -o weights/weights.lock.json",
        "ckptkit manifest --update -o weights/weights.lock.json",
        "ckptkit manifest model.pth -o model.lock.json --golden golden.safetensors --digests total",
        "ckptkit check --manifest weights/weights.lock.json",
    ),
)
@path_argument("paths", nargs=-1)
@click.option("-o", "--output", "destination", metavar="FILE", help="The manifest; default: print it.")
@click.option(
    "--digests",
    type=click.Choice(["total", "tensor"]),
    help="One digest a file, or one line a tensor as well (default: as it was, at first tensor).",
)
@click.option("--update", is_flag=True, help="Renew what has changed; without PATH, in what it was made of.")
@click.option(
    "--golden", "goldens", multiple=True, metavar="[FILE=]GOLDEN", help="Outputs recorded by verify --write-golden."
)
@allow_part_option
@click.option("--force", is_flag=True, help="Replace an existing manifest as a whole.")
@ignore_checksums
@common_options
def command(
    paths: tuple[str, ...],
    destination: str | None,
    digests: Literal["total", "tensor"] | None,
    update: bool,
    goldens: tuple[str, ...],
    allow_part: bool,
    force: bool,
    ignore_checksums: bool,
    as_json: bool,
    quiet: bool,
    color: str,
) -> int:
    """Record what released weights must be, for ckptkit check: size, SHA-256, container, trust, digests of tensors.

    A folder stands for the checkpoint files below it, and paths are recorded relative to the manifest's folder. The
    content digest of a file is the same for the same tensors in any container. Nothing is executed. In a folder that
    is named, ckptkit check lets no other checkpoint lie; files that are named stand for themselves.
    """
    if not paths and not update:
        raise click.UsageError("Missing argument 'PATH...'; only --update does without")
    if update and destination is None:
        raise click.UsageError("--update needs the manifest: -o FILE")
    with json_errors(as_json):
        manifest = api.manifest(
            paths,
            destination,
            digests=digests,
            golden=_golden(goldens),
            update=update,
            force=force,
            allow_part=allow_part,
            ignore_checksums=ignore_checksums,
        )
    code = ending.verdict(0, f"{printable(destination)} was written" if destination is not None else "")
    if as_json:
        changes = manifest.changes
        told = {name: list(getattr(changes, name)) for name in ("added", "changed", "removed", "kept")}
        passed_over = {"passed_over": dict(manifest.passed_over)} if manifest.passed_over else {}
        echo_json({**manifest.to_dict(), "changes": told, **passed_over})
        return code
    if destination is None:
        ending.write(manifest.to_json())
        return code
    if not quiet:
        for line in summary(manifest, destination, styler(color)):
            echo(line)
    return code


def _golden(values: tuple[str, ...]) -> dict[str, str] | str | None:
    """As `ckptkit.manifest` takes them: one file, or files by the paths of their checkpoints."""
    if len(values) == 1 and "=" not in values[0]:
        return values[0]
    if not values:
        return None
    pairs = dict(value.rpartition("=")[::2] for value in values)
    if "" in pairs or len(pairs) != len(values):
        raise click.UsageError("several --golden: each as FILE=GOLDEN, and each FILE once")
    return pairs


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
        yield passed_over_text(manifest.passed_over)
    yield f"{printable(destination)}: {count_of(len(records), 'file')} ({', '.join(told)})"


def _about(record: FileRecord) -> str:
    parts = [record.format, human_size(record.size), record.architecture or record.kind]
    if record.trust != "safe":
        parts.append(record.trust)
    if record.content_digest is not None:
        parts.append(record.content_digest[: len("sha256:") + _SHOWN_DIGITS] + "…")
    return printable(", ".join(parts))
