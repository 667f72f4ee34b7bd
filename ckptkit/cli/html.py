"""Documents as self-contained pages; what a page is, `ckptkit.page` says.

A page is asked for as a whole or, of a command over many files, file by file: `inspect` renders one, which another
process may do, and `inspected` makes the page of what was rendered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckptkit.cli import inspect_text
from ckptkit.inspection import surveyed
from ckptkit.page import inspected as page_of_files

if TYPE_CHECKING:
    from ckptkit.cli.options import View
    from ckptkit.inspection import Survey
    from ckptkit.inspection.document import InspectedFile, UnreadFile

__all__ = ["inspect", "inspected"]


def inspect(document: InspectedFile | Survey | UnreadFile, view: View) -> Iterator[str]:
    """The elements of one file, in the words that the terminal has for it."""
    if document["error"] is not None:
        return page_of_files.elements(document)
    survey: Any = surveyed(document)
    return page_of_files.elements(survey, inspect_text.what_it_is(survey), inspect_text.fact_lines(survey))


def inspected(files: Iterable[Iterable[str]], passed_over: Mapping[str, int]) -> Iterator[str]:
    """The lines of the page of files; `inspect` makes the lines of each."""
    return page_of_files.pages(files, passed_over)
