"""A headless Chromium, which opens the pages that runs leave as a reader does: it has no network, and says what went
wrong in its console."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
"""The names that the browser has on one system or another."""
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # which root, as in a container, cannot have
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class Browser:
    """A browser's window, at one page at a time."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, width: int = 1280, height: int = 800, *, dark: bool = False, place: str = "") -> None:
        """Open a file, at a #place in it, in a window of `width` by `height` CSS pixels, for a reader who prefers light
        or dark."""
        self.resize(width, height)
        preference = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        self.errors()
        self.driver.get(page.resolve().as_uri() + place)

    def resize(self, width: int, height: int) -> None:
        """Make the window `width` by `height` CSS pixels, also narrower than a real one can be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def js(self, script: str, *args: Any) -> Any:
        """Run the body of a function with `arguments`, and return what it returns."""
        return self.driver.execute_script(script, *args)

    def find(self, selector: str) -> Any:
        """The first element of a CSS selector; an error where there is none."""
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements of a CSS selector, in order."""
        return self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def boxes(self, selector: str) -> list[dict[str, float]]:
        """The boxes of all elements of a CSS selector in the window: left, right, top, bottom, width and height."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect().toJSON())"
        return self.js(script, selector)

    def click(self, selector: str) -> None:
        """Click an element where it can be seen and hit, as a mouse does."""
        element = self.find(selector)
        self.js("arguments[0].scrollIntoView({ block: 'center', inline: 'center' })", element)
        element.click()
        self.settle()

    def hover(self, selector: str, x: float, y: float) -> None:
        """Move the mouse over an element, to a place in CSS pixels from its upper left corner."""
        box = self.boxes(selector)[0]
        event = {"type": "mouseMoved", "x": box["left"] + x, "y": box["top"] + y}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, by their names such as ARROW_RIGHT, or single characters."""
        from selenium.webdriver import ActionChains, Keys

        ActionChains(self.driver).send_keys(*(getattr(Keys, key, key) for key in keys)).perform()
        self.settle()

    def wait(self, condition: str) -> None:
        """Wait until an expression is true; TimeoutException where it stays false."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda _: self.js(f"return {condition}"))

    def settle(self) -> None:
        """Wait until the page has drawn what its last events changed."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def picture(self) -> Image.Image:
        """The picture that the window shows."""
        return Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")

    def errors(self) -> list[str]:
        """The errors in the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """Start a browser and end it after the block. The test that asks is skipped where there is none."""
    pytest.importorskip("selenium")
    from selenium import webdriver

    driver, program = shutil.which("chromedriver"), next(filter(None, map(shutil.which, PROGRAMS)), None)
    if driver is None or program is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    quiet = webdriver.ChromeService(driver, log_output=os.devnull)
    window = webdriver.Chrome(options, quiet)
    try:
        yield Browser(window)
    finally:
        window.quit()
