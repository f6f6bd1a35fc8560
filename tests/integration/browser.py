"""A real browser without a screen."""

import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1100,2400"
).split()


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.fail("no Chromium on this machine: apt-get install -y chromium (or deselect with -m 'not browser')")


def browse(page: Path | str, profile: Path, *flags: str) -> str:
    """Open a file or an address in a fresh browser and return what it printed."""
    address = page if isinstance(page, str) else page.as_uri()
    command = [_browser(), *FLAGS, f"--user-data-dir={profile}", *flags, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
