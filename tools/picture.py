"""The first screen of a run's report as a picture: `python tools/picture.py DOCUMENT PICTURE`.

    .venv/bin/python tools/picture.py docs/runs/2026-11-24-cpu.json docs/report.png

DOCUMENT is a session's `report.json`. The page is made anew from it, and photographed by the machine's Chromium
(Debian: apt-get install chromium) without a network. Runs in drydock's environment.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from drydock.errors import DrydockError
from drydock.report import PAGE, write

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1200, 705
"""Pixels: as wide as a page that shows all its columns, as high as what it says of the tiers."""


def photograph(document: Path, picture: Path) -> None:
    """Write a PNG of WIDTH x HEIGHT pixels.

    Raises:
        DrydockError: the document is none of ours, or this machine has no browser that makes one.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise DrydockError("no Chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="drydock-picture-") as folder:
        write(document, Path(folder))
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
                "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}",
                "--blink-settings=preferredColorScheme=1", f"--user-data-dir={folder}/profile",
                f"--screenshot={picture.absolute()}", (Path(folder) / PAGE).as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    if done.returncode or not picture.is_file():
        raise DrydockError(f"{browser} made no picture: {done.stderr.strip()[-300:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    try:
        photograph(arguments.document, arguments.picture)
    except DrydockError as error:
        print(f"drydock: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
