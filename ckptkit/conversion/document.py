"""The document of ``ckptkit convert`` on a folder; what documents are, `ckptkit.documents` says."""

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
    """A file of a folder that was converted, or with ``--dry-run`` would be.

    Attributes:
        seconds: that it took.
        error: none; by it the two kinds of files are told apart.
    """

    seconds: float
    error: None


class UnconvertedFile(TypedDict):
    """A file of a folder that could not be converted, or a folder whose files are together one checkpoint.

    Attributes:
        destination: what was not written; ``None``: it was not tried.
        written: that it was not.
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
        written: whether outputs were to be; with ``--dry-run`` none is.
        files: those that were converted, in the order of the walk, after those that could not even be tried.
        passed_over: how many files of each kind are not checkpoints, or other names of those that are.
        passed_over_files: these, by path, with their kinds.
        seconds: that all of it took.
    """

    source: str
    destination: str
    written: bool
    files: list[ConvertedFile | UnconvertedFile]
    passed_over: dict[str, int]
    passed_over_files: dict[str, str]
    seconds: float


class ConvertFolderDocument(ConvertFolderDetails):
    """What ``ckptkit convert`` tells of a folder.

    Attributes:
        ok: whether every file was converted.
        findings: one for each that was not.
    """

    schema_version: int
    ok: bool
    findings: list[FindingDocument]
