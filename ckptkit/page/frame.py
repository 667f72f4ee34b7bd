"""The frame of a page: its head, policy, data and scripts.

A Content-Security-Policy allows the scripts of the page by their hashes, and no request of any kind
(https://www.w3.org/TR/CSP3/), so that even a text that became markup could neither run nor fetch anything.
A page is ASCII, whatever the encoding of the stream it goes to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from ckptkit.extras import __version__, package_file
from ckptkit.report import printable

__all__ = ["charts_script", "element", "page", "plain", "without_scripts"]

_LARGEST = 1 << 53
"""The whole numbers below it are exact in JavaScript."""

_UNSAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
"""What could end an element or begin one, as JSON has it in strings, where alone it stands."""

_MOST_WITHOUT_SCRIPTS = 50
"""Lines of one list where scripts do not run."""

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")

_MAX_TEXT = 20_000
"""Characters of one text in a page: a name in a file may have millions."""


def page(title: str, script: str, elements: Iterable[str], *, has_charts: bool = True) -> Iterator[str]:
    """The lines of a page.

    Args:
        title: in the browser's tab.
        script: name of the script in this folder that shows the data: ``"inspect.js"``.
        elements: what `element` makes; each is made when the page has come to it.
        has_charts: whether plotly.js is in it (5 MB).

    Raises:
        MissingDependencyError: plotly is not installed; raised before the first line is given.
    """
    names = ("page.js", "table.js", "charts.js", script) if has_charts else ("page.js", "table.js", script)
    scripts = [_own(name) for name in names]
    if has_charts:
        scripts.insert(0, charts_script())
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<meta name="generator" content="ckptkit {__version__}">'
    yield f"<title>{_ascii_text(title)}</title>"
    yield f"<style>{_own('page.css')}</style></head>"
    yield "<body><noscript><p>This page needs JavaScript to show all of its data. In short:</p></noscript>"
    yield '<div id="page"></div>'
    yield from elements
    yield from (f"<script>{text}</script>" for text in scripts)
    yield "</body></html>"


def charts_script() -> str:
    """plotly.js; whoever computes long for a page with charts asks for it first.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    return _ascii(package_file("plotly", "package_data/plotly.min.js").decode())


def element(name: str, value: Any) -> str:
    """Data of a page; its script gets it by ``Page.data(name)``, of several of a name by ``Page.data(name, number)``.

    Args:
        name: one of our own.
        value: as `plain` makes it.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return f'<script type="application/json" data-name="{name}">{text.translate(_UNSAFE)}</script>'


def without_scripts(
    heading: str, texts: Iterable[str], findings: Sequence[Mapping[str, Any]] = (), *, more: Sequence[str] = ()
) -> str:
    """What a page, or one file of it, says where scripts do not run; elsewhere a browser does not show it.

    Args:
        heading: of it.
        texts: a line each.
        findings: of a document, as many of which are shown as anybody reads.
        more: shown as a list below them, as many as of these.
    """
    told = [f"<h2>{_ascii_text(heading)}</h2>", *(f"<p>{_ascii_text(text)}</p>" for text in texts if text)]
    fixes = (f"<pre>{_ascii_text(each['fix'])}</pre>" if each.get("fix") else "" for each in findings)
    lines = [f"{each['severity']}: {_where(each)}{each['message']}" for each in findings]
    for items in ([*zip(lines, fixes, strict=True)], [(each, "") for each in more]):
        shown = [f"<li>{_ascii_text(text)}{fix}</li>" for text, fix in items[:_MOST_WITHOUT_SCRIPTS]]
        shown += [f"<li>and {len(items) - len(shown):,} more</li>"] if len(items) > len(shown) else []
        told += ["<ul>", *shown, "</ul>"] if shown else []
    return f"<noscript>{''.join(told)}</noscript>"


def _where(finding: Mapping[str, Any]) -> str:
    return f"{finding['path']}: " if finding.get("path") else ""


def plain(value: Any) -> Any:
    """A value of a document as pages have it.

    Texts are as a terminal would show them (control characters, lone surrogates and marks of direction escaped) and not
    endless; numbers that JavaScript does not have are text.
    """
    if isinstance(value, str):
        return printable(value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}…")
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int) and not -_LARGEST < value < _LARGEST:
        return str(value)
    return value


def _own(name: str) -> str:
    """A style or script of this folder."""
    return _ascii(resources.files("ckptkit.page").joinpath(name).read_text(encoding="utf-8"))


def _ascii(script: str) -> str:
    r"""A script with ``\u`` escapes, which are the same in its strings, for what is not ASCII."""
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], script)


def _ascii_text(text: str) -> str:
    return escape(plain(text)).encode("ascii", "xmlcharrefreplace").decode()
