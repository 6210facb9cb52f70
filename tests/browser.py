"""A headless Chromium for tests of pages; none where the system has none."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip


def missing() -> str | None:
    """Why there is no browser; ``None`` where there is one."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "needs Chromium: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs selenium: pip install 'suture[test]'"
    return None


needs_browser = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@contextmanager
def browser() -> Iterator[Any]:
    """A browser with a profile of its own, which knows nothing and asks nobody."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with TemporaryDirectory(ignore_cleanup_errors=True) as profile, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of selenium's own sockets, when the driver ends
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, Service(str(shutil.which("chromedriver"))))
        try:
            driver.set_page_load_timeout(60)
            driver.set_script_timeout(60)
            yield driver
        finally:
            driver.quit()


def look(
    driver: Any, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False
) -> None:
    """Open a page at a width, in light or dark surroundings, and wait until all charts are drawn."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(page.resolve().as_uri())
    assert driver.execute_async_script(
        """
        const done = arguments[0], begun = Date.now();
        dispatchEvent(new Event("beforeprint"));  // draws what is still out of view
        const wait = () => {
          const places = [...document.querySelectorAll("[data-chart], .broken")];
          if (places.every((p) => p.dataset.drawn || p.className === "broken")) done("drawn");
          else if (Date.now() - begun > 50000) done("not all charts were drawn in time");
          else setTimeout(wait, 50);
        };
        wait();
        """
    ) == "drawn"  # fmt: skip


def picture(driver: Any, path: Path, top: int = 0, height: int = 900, width: int = 1280) -> None:
    """Save what the page looks like from ``top`` on."""
    import base64

    clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
    )
    path.write_bytes(base64.b64decode(shot["data"]))
