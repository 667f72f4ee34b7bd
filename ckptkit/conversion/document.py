"""The document of ``ckptkit convert`` on a folder; `ckptkit.documents` says what documents are."""

from __future__ import annotations

from typing import TypedDict

from ckptkit.documents import ConvertDocument, ErrorDocument
from ckptkit.report import FindingDocument

__all__ = ["ConvertFolderDetails", "ConvertFolderDocument", "ConvertedFile", "ReplacedDocument", "UnconvertedFile"]


class ReplacedDocument(ConvertDocument):
    """A file that was converted in place.

    Attributes:
        backup: the path under which the old file is kept; ``None``: it is not.
    """

    backup: str | None


class ConvertedFile(ConvertDocument):
    """A file of a folder that was converted or, with ``--dry-run``, would be.

    Attributes:
        seconds: that it took.
        error: ``None``; this distinguishes the two kinds of files.
    """

    seconds: float
    error: None


class UnconvertedFile(TypedDict):
    """A file of a folder that could not be converted, or a folder whose files form one checkpoint.

    Attributes:
        destination: the output that was not written; ``None``: it was not tried.
        written: false.
    """

    source: str
    destination: str | None
    written: bool
    source_nbytes: int
    seconds: float
    error: ErrorDocument


class ConvertFolderDetails(TypedDict):
    """The ``details`` of the report of `ckptkit.convert` on a folder.

    Attributes:
        source, destination: the folders.
        written: whether outputs should be written; not with ``--dry-run``.
        files: the converted files, in the order of the walk, after those that could not be tried.
        passed_over: how many files are not checkpoints, or are other names of checkpoints, by kind.
        passed_over_files: these, by path, with their kinds.
        seconds: total time.
    """

    source: str
    destination: str
    written: bool
    files: list[ConvertedFile | UnconvertedFile]
    passed_over: dict[str, int]
    passed_over_files: dict[str, str]
    seconds: float


class ConvertFolderDocument(ConvertFolderDetails):
    """The document of ``ckptkit convert`` for a folder.

    Attributes:
        ok: whether every file was converted.
        findings: one for each that was not.
    """

    schema_version: int
    ok: bool
    findings: list[FindingDocument]
