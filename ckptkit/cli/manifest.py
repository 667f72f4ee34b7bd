"""``ckptkit manifest PATH... -o FILE``: record what released weights must be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

from ckptkit import api
from ckptkit.cli import closing, ending
from ckptkit.cli import options as ui
from ckptkit.cli.closing import read
from ckptkit.cli.tables import wrapped
from ckptkit.cli.usage import Choice
from ckptkit.errors import FileAccessError
from ckptkit.formats.folder import passed_over_text
from ckptkit.released.manifest_file import manifest_text
from ckptkit.report import count_of, human_size, printable

if TYPE_CHECKING:
    from ckptkit.documents import ManifestDocument, ManifestFile
    from ckptkit.released.manifest_file import Manifest

__all__ = ["RENDERERS", "changed_files", "command", "document_of", "text", "told"]

_MARKS = {"added": ("+", "green"), "changed": ("~", "yellow"), "removed": ("-", "red")}

_SHOWN_DIGITS = 12
"""Of a content digest: enough to tell files apart."""


def document_of(manifest: Manifest) -> ManifestDocument:
    """The document: the manifest, and what became of it."""
    written, changes = manifest.to_dict(), manifest.changes
    document: ManifestDocument = {
        "schema_version": written["schema_version"],
        "folders": written["folders"],
        "files": written["files"],
        "changes": {
            "added": [*changes.added],
            "changed": [*changes.changed],
            "removed": [*changes.removed],
            "kept": [*changes.kept],
        },
    }
    if manifest.passed_over:
        document["passed_over"] = dict(manifest.passed_over)
    return document


def text(document: ManifestDocument, view: ui.View) -> Iterator[str]:
    """One line for each file that was added, changed or removed, and one for all; the manifest if it is not written."""
    if view.written is None:
        yield from "".join(manifest_text(document)).splitlines()
        return
    if view.quiet:
        return
    for what, path, about in changed_files(document):
        mark, color = _MARKS[what]
        line = f"{view.style(mark, fg=color)} {printable(path)}{f'  {printable(about)}' if about else ''}"
        yield from wrapped(line, view.width)
    if document.get("passed_over"):
        yield from wrapped(passed_over_text(document["passed_over"]), view.width)
    yield from wrapped(f"{printable(view.written)}: {told(document)}", view.width)


def changed_files(document: ManifestDocument) -> Iterator[tuple[str, str, str]]:
    """What became of each file that is not as it was recorded, its path, and what it is."""
    records = {record["path"]: record for record in document["files"]}
    changes = document["changes"]
    for what, paths in (("added", changes["added"]), ("changed", changes["changed"]), ("removed", changes["removed"])):
        for path in paths:
            yield what, path, _about(records[path]) if path in records else ""


def _about(record: ManifestFile) -> str:
    parts = [record["format"], human_size(record["size"]), record["architecture"] or record["kind"]]
    if record["trust"] != "safe":
        parts.append(record["trust"])
    if record["content_digest"] is not None:
        parts.append(record["content_digest"][: len("sha256:") + _SHOWN_DIGITS] + "…")
    return ", ".join(parts)


def told(document: ManifestDocument) -> str:
    """How many files it records, and what became of them: ``"3 files (1 added, 2 unchanged)"``."""
    changes = document["changes"]
    counts = [("added", changes["added"]), ("changed", changes["changed"]), ("removed", changes["removed"])]
    parts = [f"{len(paths):,} {what}" for what, paths in (*counts, ("unchanged", changes["kept"])) if paths]
    return f"{count_of(len(document['files']), 'file')} ({', '.join(parts)})"


RENDERERS: dict[str, ui.Renderer] = {"text": text, "markdown": ui.later("markdown.manifest")}


@click.command(
    "manifest",
    epilog=ui.with_examples(
        "ckptkit manifest weights/ -o weights/weights.lock.json",
        "ckptkit manifest s3://bucket/models/ -o models.lock.json",
        "ckptkit manifest --update -o weights/weights.lock.json",
        "ckptkit manifest model.pth -o model.lock.json --golden golden.safetensors --digests total",
        "ckptkit check --manifest weights/weights.lock.json",
    ),
)
@ui.path_argument("paths", nargs=-1)
@click.option("-o", "--output", "destination", metavar="FILE", help="The manifest; default: print it.")
@click.option(
    "--digests",
    type=Choice(["total", "tensor"]),
    help="One digest per file, or one per tensor too; default: as in the existing manifest, else tensor.",
)
@click.option(
    "--update", is_flag=True, help="Update what has changed; without PATH, in everything the manifest was made from."
)
@click.option(
    "--golden", "goldens", multiple=True, metavar="[FILE=]GOLDEN", help="Outputs recorded by verify --write-golden."
)
@ui.tag_option
@ui.tp_rules_option
@ui.allow_part_option
@click.option("--force", is_flag=True, help="Replace an existing manifest completely.")
@ui.files_from_option
@ui.jobs_option
@ui.ignore_checksums
@ui.storage_option
@ui.common_options(RENDERERS, writes_file=False)
def command(
    paths: tuple[str, ...],
    destination: str | None,
    digests: Literal["total", "tensor"] | None,
    update: bool,
    goldens: tuple[str, ...],
    tag: str | None,
    tp_rules: str | None,
    allow_part: bool,
    force: bool,
    files_from: str | None,
    jobs: int | None,
    ignore_checksums: bool,
    storage_options: dict[str, Any],
    output: str,
    quiet: bool,
    color: str,
) -> int:
    """Record what released weights must be, for ckptkit check: size, SHA-256, container, trust, digests of tensors.

    A folder means the checkpoint files below it, and paths are recorded relative to the manifest's folder.  The content
    digest of a file is the same for the same tensors in any container.  Nothing is executed.  If you name a folder,
    ckptkit check reports any other checkpoint in it; if you name files, only those files are covered.  Files and
    folders may be URLs (https://, s3://, gs://, az://, hf://user/repo).
    """
    if not paths and not update and files_from is None:
        raise click.UsageError("Missing argument 'PATH...'; only --update needs none")
    if update and destination is None:
        raise click.UsageError("--update needs the manifest: -o FILE")
    with ui.json_errors(output == "json"):
        listed = ui.with_listed(paths, files_from)
        if files_from is not None and not listed:
            raise FileAccessError(f"{files_from}: lists no files to record", path=files_from)
        manifest = api.manifest(
            listed,
            destination,
            digests=digests,
            golden=_golden(goldens),
            update=update,
            force=force,
            tag=tag,
            tp_rules=tp_rules,
            allow_part=allow_part,
            ignore_checksums=ignore_checksums,
            storage_options=storage_options,
            jobs=jobs,
        )
    if output == "text":
        closing.summary(read(len(manifest.files), sum(record.size for record in manifest.files)))
    code = ending.verdict(0, f"{printable(destination)} was written" if destination is not None else "")
    ui.show(
        document_of(manifest),
        output,
        RENDERERS,
        ui.View(ui.styler(color), ui.terminal_width(), quiet, written=destination),
    )
    return code


def _golden(values: tuple[str, ...]) -> dict[str, str] | str | None:
    """As `ckptkit.manifest` takes them: one file, or files by the paths of their checkpoints."""
    if len(values) == 1 and "=" not in values[0]:
        return values[0]
    if not values:
        return None
    pairs = dict(value.rpartition("=")[::2] for value in values)
    if "" in pairs or len(pairs) != len(values):
        raise click.UsageError("several --golden: give each as FILE=GOLDEN, and each FILE once")
    return pairs
