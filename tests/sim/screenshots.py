"""Pictures of the page for the docs, from `kvist demo --keep`: python tests/sim/screenshots.py."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sim.browser import Browser

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Width, and height: down to the tiers.
SIZES = ((1280, 1342), (390, 1690))
DRAWN = "return document.querySelectorAll('.uplot canvas').length === 4"
ASKING = "Still running"
# So long the demo asks on before it is looked at.
WATCH_S = 150.0


def take(url: str, folder: Path) -> None:
    """Take the page in both widths, light and dark."""
    browser = Browser()
    try:
        for width, height in SIZES:
            for dark in (False, True):
                browser.open(url, width, dark)
                browser.wait(DRAWN, "the charts")
                file = folder / f"page-{width}{'-dark' if dark else ''}.png"
                browser.picture(file, width, height)
                print(f"{file.name}: {file.stat().st_size} bytes")
    finally:
        browser.close()


def main() -> None:
    """Play the demo, or look at a page that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a page; without it the demo is played")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder (%(default)s)")
    flags = parser.parse_args()
    if flags.url:
        take(flags.url, flags.out)
        return
    command = [str(Path(sys.executable).parent / "kvist"), "demo", "--keep"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as demo:
        try:
            assert demo.stdout is not None
            url = ""
            for line in demo.stdout:
                print(line, end="", flush=True)
                found = re.match(r"page +(http://\S+)", line)
                url = found.group(1) if found else url
                if ASKING in line:
                    break
            time.sleep(WATCH_S)
            take(url, flags.out)
        finally:
            demo.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
