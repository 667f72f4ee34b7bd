"""Documents as self-contained pages; what a page is, `ckptkit.page` says.

A page is asked for as a whole or, of a command over many files, file by file: `inspect` renders one, which another
process may do, and `inspected` makes the page of what was rendered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckptkit.cli import closing, inspect_text
from ckptkit.inspection import surveyed
from ckptkit.page import inspected as page_of_files
from ckptkit.page import reported

if TYPE_CHECKING:
    from ckptkit.cli.options import View
    from ckptkit.differences.difference import DiffDocument
    from ckptkit.documents import CheckDocument, VerifyDocument
    from ckptkit.inspection import Survey
    from ckptkit.inspection.document import InspectedFile, UnreadFile

__all__ = ["check", "diff", "inspect", "inspected", "verify"]


def inspect(document: InspectedFile | Survey | UnreadFile, view: View) -> Iterator[str]:
    """The elements of one file, in the words that the terminal has for it."""
    if document["error"] is not None:
        return page_of_files.elements(document)
    survey: Any = surveyed(document)
    sentence, facts = inspect_text.what_it_is(survey), inspect_text.fact_lines(survey)
    combined = closing.combined_title(survey["combined_fix"], survey["findings"])
    return page_of_files.elements(survey, sentence, facts, combined)


def inspected(files: Iterable[Iterable[str]], passed_over: Mapping[str, int]) -> Iterator[str]:
    """The lines of the page of files; `inspect` makes the lines of each."""
    return page_of_files.pages(files, passed_over)


def diff(document: DiffDocument, view: View) -> Iterator[str]:
    """The page of a difference, in the words that the terminal has for it."""
    from ckptkit.cli.diff import notes

    return reported.diff(document, notes)


def check(document: CheckDocument, view: View) -> Iterator[str]:
    """The page of a check, or of runs that were combined."""
    return reported.check(document)


def verify(document: VerifyDocument, view: View) -> Iterator[str]:
    """The page of a verification."""
    return reported.verify(document)
