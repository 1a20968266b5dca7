"""A real browser for the tests of pages: headless Chromium, where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def browse(page: Path, tmp_path: Path, *flags: str) -> str:
    """Run the browser on a page, in a profile of its own; returns what it prints."""
    assert BROWSER is not None
    profile = tmp_path / "profile"
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def probed(page: str, script: str, tmp_path: Path, width: int = 1000, *flags: str) -> Any:
    """What a script finds that runs once the page is loaded: the value of its `found`.

    The page's policy would refuse a script that is not its own, so it is taken off for this.
    """
    place = tmp_path / "probed.html"
    page = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", page)
    ending = "document.body.setAttribute('data-probe', JSON.stringify(found));"
    faults = (
        "<script>window.faults = []; window.onerror = words => { faults.push(words); };</script>"
    )
    page = page.replace("<head>", f"<head>{faults}", 1)
    page = page.replace("</body>", f"<script>{{ {script}; {ending} }}</script></body>")
    place.write_text(page, encoding="utf-8")
    dom = browse(place, tmp_path, f"--window-size={width},900", *flags, "--dump-dom")
    result = re.search(r'data-probe="([^"]*)"', dom)
    assert result is not None, dom[:2000]
    return json.loads(html.unescape(result[1]))
