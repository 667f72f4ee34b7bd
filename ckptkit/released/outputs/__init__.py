"""The machine-readable outputs of a check, one module each; the screen is the command's own.

Adding one is a module with ``render(report) -> str`` and a line in `OUTPUTS`.
"""

from __future__ import annotations

from collections.abc import Callable

from ckptkit.released.outputs import github, json_document, junit, markdown, sarif
from ckptkit.released.results import CheckReport

__all__ = ["OUTPUTS"]

OUTPUTS: dict[str, Callable[[CheckReport], str]] = {
    "json": json_document.render,
    "junit": junit.render,
    "sarif": sarif.render,
    "github": github.render,
    "markdown": markdown.render,
}
"""Every output by the name it has as an option's value."""
