"""A headless Chromium for pages, and axe-core, if both are installed.

The documentation's screenshots, of a report and of a comparison:

    python -m benchmarks.browser results/run/report.html docs/figures
    python -m benchmarks.browser compared.html docs/figures --name compare
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
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
AXE = Path("node_modules", "axe-core", "axe.min.js")
DESKTOP, TABLET, PHONE = (1280, 800, 1, False), (768, 1024, 1, False), (390, 844, 2, True)
SCREENS = {"desktop": DESKTOP, "tablet": TABLET, "phone": PHONE}


def find_axe() -> Path | None:
    """axe.min.js: from ``AXE_JS``, or where ``npm install axe-core`` puts it in the project's folder."""
    path = Path(os.environ.get("AXE_JS", ROOT / AXE))
    return path if path.is_file() else None


def list_missing(axe: bool = True) -> str:
    """The tools for tests of pages that are not installed; empty if all are."""
    wanted: dict[str, Any] = {
        "selenium (pip install '.[browser]')": find_spec("selenium"),
        "chromium": shutil.which("chromium"),
        "chromedriver": shutil.which("chromedriver"),
    }
    if axe:
        wanted["axe-core (npm install --no-save axe-core, or AXE_JS=axe.min.js)"] = find_axe()
    return ", ".join(name for name, found in wanted.items() if not found)


def make_address(page: Path | str) -> str:
    return page if isinstance(page, str) else page.as_uri()


class Browser:
    """One tab."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str, screen: tuple[int, int, int, bool] = DESKTOP) -> None:
        """Loads a file or address; ``screen`` is width, height, pixel ratio, and whether it is a phone."""
        width, height, ratio, mobile = screen
        size = {"width": width, "height": height, "deviceScaleFactor": ratio, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(make_address(page))

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs the script and returns its value."""
        return self.driver.execute_script(script, *arguments)

    def read_console(self) -> list[str]:
        """The console's messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def list_requests(self, page: Path | str) -> list[str]:
        """Addresses requested since the page was, except the page and its data URIs."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        since = urls.index(make_address(page))
        return [url for url in urls[since + 1 :] if not url.startswith("data:")]

    def find_violations(self) -> list[str]:
        """The violations that axe-core finds in the page as it is now."""
        path = find_axe()
        assert path is not None
        self.run(path.read_text(encoding="utf-8"))
        script = "const done = arguments[0]; axe.run().then((found) => done(found.violations));"
        found = self.driver.execute_async_script(script)
        return [f"{v['id']}: {node['html'][:200]}" for v in found for node in v["nodes"]]

    def wait(self, script: str, seconds: float = 20) -> None:
        """Waits until the script returns something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda _: self.run(script), script)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
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


def take_screenshots(page: Path, folder: Path, name: str) -> None:
    """Writes ``NAME-SCREEN.png``, the page's top, and ``NAME-cases-SCREEN.png``, for each of ``SCREENS``."""
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as tab:
        for (screen, size), part in product(SCREENS.items(), ("", "cases-")):
            tab.open(page, size)
            if part:
                tab.run("document.getElementById('found').scrollIntoView()")
            # Images load when they are near the screen.
            time.sleep(3)
            file = folder / f"{name}-{part}{screen}.png"
            tab.driver.save_screenshot(str(file))
            Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
                file, optimize=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="takes the documentation's screenshots of a report")
    parser.add_argument("page", type=Path, help="report.html of a run, or a comparison")
    parser.add_argument("folder", type=Path, help="where NAME-desktop.png and the others go")
    parser.add_argument("--name", default="report", help="default: %(default)s")
    args = parser.parse_args()
    if missing := list_missing(axe=False):
        parser.error(f"not installed: {missing}")
    if not args.page.is_file() or not args.folder.is_dir():
        parser.error(f"{args.page}, {args.folder}: expected a file and a folder")
    take_screenshots(args.page.resolve(), args.folder, args.name)


if __name__ == "__main__":
    main()
