"""A headless Chromium for tests of the page and for its pictures."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "needs Debian's packages chromium and chromium-driver"
HEIGHT = 900
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--force-color-profile=srgb", "--window-size=1280,900",
)  # fmt: skip


class Browser:
    """One window. Close it."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self._said: list[str] = []

    def close(self) -> None:
        """End it."""
        self.driver.quit()

    def open(self, url: str, width: int, dark: bool = False) -> None:
        """Open a page in a window of a width, with the system's colours."""
        self.width(width)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)

    def width(self, width: int, height: int = HEIGHT, scale: float = 1.0) -> None:
        """Make the window so wide, a phone's below 500."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale}
        metrics["mobile"] = width < 500
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script: str, *arguments: object) -> Any:
        """Run a script's body in the page; what it returns."""
        return self.driver.execute_script(script, *arguments)

    def text(self, css: str) -> str:
        """What a part of the page says."""
        return str(self.driver.find_element(By.CSS_SELECTOR, css).text)

    def click(self, css: str) -> None:
        """Press a button."""
        self.driver.find_element(By.CSS_SELECTOR, css).click()

    def press(self, css: str, key: str) -> None:
        """Give a part of the page the focus and press a key."""
        self.driver.find_element(By.CSS_SELECTOR, css).send_keys(key)

    def wait(self, script: str, what: str, timeout_s: float = 10.0) -> None:
        """Until a script returns true."""
        waiting = WebDriverWait(self.driver, timeout_s, poll_frequency=0.05)
        waiting.until(lambda _driver: self.run(script), f"waited {timeout_s} s for {what}")

    def complaints(self) -> list[str]:
        """What the console said since the last call: errors of scripts, policy and network."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def hosts(self) -> set[str]:
        """Who was asked for anything since the last call, data in the page itself apart."""
        found = set()
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                found.add(urlsplit(event["params"]["request"]["url"]).netloc)
        return found - {""}

    def picture(self, file: Path, width: int, height: int = 0) -> None:
        """The page as it looks, all of it or its first rows."""
        tall = height or int(self.run("return document.documentElement.scrollHeight"))
        self.width(width, tall)
        self.wait("return document.readyState === 'complete'", "the page to be drawn")
        self.run("return new Promise((done) => setTimeout(done, 900))")  # charts fit themselves
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        file.write_bytes(base64.b64decode(shot["data"]))
        self.width(width)
