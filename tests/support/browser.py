"""A headless Chromium for the tests of pages: what it shows, and all that it complained about or asked for."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INSTALL = "apt-get install chromium chromium-driver"

LINES = 1_000
"""Before the first script of a page: more than any has."""


class Browser:
    """A page; ``driver`` is selenium's, ``folder`` an empty one."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self._place = folder / "page.html"
        self._page: Path | None = None

    def open(self, page: Path, *, dark: bool = False, as_it_is: bool = False) -> None:
        """Open a page; ``as_it_is``: where it is open already it stays as the test before left it."""
        self.emulate(dark=dark)
        self.size(1400)
        if not as_it_is or self._page != page:
            self._page = page
            self._place.write_text(lowered(page.read_text()))
            self.js("window.isOld = true")  # a driver may be back before the page that it opens
            self.driver.get(self._place.as_uri())
            self.until("return !window.isOld && document.readyState === 'complete' && typeof Page === 'object'")

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def emulate(self, *, dark: bool = False, media: str = "") -> None:
        wanted = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def complaints(self) -> list[str]:
        """Of scripts, and of the page's policy, since they were last asked for."""
        return [each["message"] for each in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Every URL that was asked for since they were last."""
        messages = [json.loads(each["message"])["message"] for each in self.driver.get_log("performance")]
        return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str) -> Any:
        """What a script returns once that is true: charts are drawn anew a while after a page changes its size."""
        for _ in range(200):
            if found := self.js(script):
                return found
            time.sleep(0.05)
        raise AssertionError(f"in vain: {script}")

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def texts(self, css: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)", css)

    def text(self, css: str) -> str:
        return self.texts(css)[0]

    def column(self, part: str, number: int = 1) -> list[str]:
        """A column of a table, of the rows that are in the page."""
        return self.texts(f"#{part} tbody tr[data-at] td:nth-child({number})")

    def click(self, css: str, number: int = 0) -> None:
        """As a mouse does, but wherever the page is scrolled to."""
        self.js("document.querySelectorAll(arguments[0])[arguments[1]].click()", css, number)

    def keys(self, *keys: str) -> None:
        """Typed into what has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def typed(self, css: str, text: str) -> None:
        """Into a field, in place of what is in it."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.js(script, self.one(css), text)

    def choose(self, css: str, value: str) -> None:
        """An option of a select, which has a field's events."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
        self.js(script, self.one(css), value)


def lowered(text: str) -> str:
    """A page with blank lines in its head: a script at the URL and the line of an equal one is not compiled again."""
    before = text.index("<script>")
    return text.replace("<style>", "\n" * (LINES - text.count("\n", 0, before)) + "<style>", 1)


@contextmanager
def started(chromium: str, driver: str) -> Iterator[Browser]:
    """A browser of these programs."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--disable-extensions", "--disable-background-networking", "--disable-component-update", "--no-first-run"),
        *("--in-process-gpu", "--num-raster-threads=1", "--js-flags=--single-threaded"),  # tests have no core to spare
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Browser(made, Path(folder))
    finally:
        made.quit()
