"""One headless Chromium for all tests of pages, and the pages that they look at.

Debian has it: ``apt-get install chromium chromium-driver``.  Where there is none the tests are skipped; where
CKPTKIT_BROWSER is ``required`` they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.browser import INSTALL, Browser, started
from support.commands import output_of

from ckptkit.cli.inspect import command as inspect_command


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        stop = pytest.fail if os.environ.get("CKPTKIT_BROWSER") == "required" else pytest.skip
        stop(f"needs chromium and chromedriver: {INSTALL}")
    else:
        with started(program, driver) as browser:
            yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """After each test nothing was asked for but pages, and nothing was complained about."""
    chromium.complaints(), chromium.requests()
    yield chromium
    assert [url for url in chromium.requests() if not url.startswith("file:///") or not url.endswith(".html")] == []
    assert chromium.js("return performance.getEntriesByType('resource').map((each) => each.name)") == []
    assert chromium.complaints() == []
    assert chromium.js("return window.pwned === undefined")


@pytest.fixture(scope="session")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``inspected("model.pth", "--stats")``: the page of the command, made once."""
    folder = tmp_path_factory.mktemp("pages")
    known: dict[tuple[str, ...], Path] = {}

    def page(*arguments: object, code: int | None = 0) -> Path:
        typed = tuple(map(str, arguments))
        if typed not in known:
            known[typed] = folder / f"{len(known)}.html"
            output_of(inspect_command, *typed, "--format", "html", code=code, to=str(known[typed]))
        return known[typed]

    return page
