"""A headless Chromium for pages, and axe-core, where both are installed.

python -m benchmarks.browser results/run/report.html docs/figures   # the documentation's screenshots
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
AXE = Path("node_modules", "axe-core", "axe.min.js")
SHOWN = {"desktop": "charts", "phone": "found"}
DESKTOP, PHONE = (1200, 900, 1, False), (390, 844, 2, True)


def axe_file() -> Path | None:
    """axe.min.js: of ``AXE_JS``, or as ``npm install axe-core`` leaves it in the project's folder."""
    path = Path(os.environ.get("AXE_JS", ROOT / AXE))
    return path if path.is_file() else None


def lacking(axe: bool = True) -> str:
    """What pages are tested with and is not installed, empty where all is there."""
    wanted: dict[str, Any] = {
        "selenium (pip install '.[browser]')": find_spec("selenium"),
        "chromium": shutil.which("chromium"),
        "chromedriver": shutil.which("chromedriver"),
    }
    if axe:
        wanted["axe-core (npm install --no-save axe-core, or AXE_JS=axe.min.js)"] = axe_file()
    return ", ".join(name for name, found in wanted.items() if not found)


def address(page: Path | str) -> str:
    return page if isinstance(page, str) else page.as_uri()


class Browser:
    """One tab."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str, screen: tuple[int, int, int, bool] = DESKTOP) -> None:
        """Loads a file or address as a screen of that width, height, pixel ratio and kind, phone or not."""
        width, height, ratio, mobile = screen
        size = {"width": width, "height": height, "deviceScaleFactor": ratio, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(address(page))

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns."""
        return self.driver.execute_script(script, *arguments)

    def complaints(self) -> list[str]:
        """What the console has said since it was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self, page: Path | str) -> list[str]:
        """Addresses that were asked for since the page was, apart from the page and what it holds itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        since = urls.index(address(page))
        return [url for url in urls[since + 1 :] if not url.startswith("data:")]

    def violations(self) -> list[str]:
        """What axe-core finds wrong with the page as it is now."""
        path = axe_file()
        assert path is not None
        self.run(path.read_text(encoding="utf-8"))
        script = "const done = arguments[0]; axe.run().then((found) => done(found.violations));"
        found = self.driver.execute_async_script(script)
        return [f"{v['id']}: {node['html'][:200]}" for v in found for node in v["nodes"]]

    def wait(self, script: str, seconds: float = 20) -> None:
        """Until the script returns something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda _: self.run(script), script)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Chromium with a new, empty ``profile``."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(str(shutil.which("chromedriver")))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(110)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def screenshots(page: Path, folder: Path) -> None:
    """``report-desktop.png``, the charts and cases, and ``report-phone.png``, a case that is open."""
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        for name, screen in (("desktop", DESKTOP), ("phone", PHONE)):
            tab.open(page, screen)
            tab.run("document.querySelectorAll('.case details')[0].open = true")
            tab.run("document.getElementById(arguments[0]).scrollIntoView()", SHOWN[name])
            # Pictures come when they are near.
            time.sleep(3)
            file = folder / f"report-{name}.png"
            tab.driver.save_screenshot(str(file))
            Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
                file, optimize=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="takes the documentation's screenshots of a report")
    parser.add_argument("page", type=Path, help="report.html of a run")
    parser.add_argument("folder", type=Path, help="where report-desktop.png and report-phone.png go")
    given = parser.parse_args()
    if missing := lacking(axe=False):
        parser.error(f"not installed: {missing}")
    if not given.page.is_file() or not given.folder.is_dir():
        parser.error(f"{given.page}, {given.folder}: expected a file and a folder")
    screenshots(given.page.resolve(), given.folder)


if __name__ == "__main__":
    main()
