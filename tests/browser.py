"""Headless Chromium for tests that look at a page: a picture of it, or what a script in it answers.

Needs the programs `chromium` and `chromedriver` (Debian: apt-get install chromium chromium-driver) and no
package of Python's: chromedriver is spoken to over HTTP. Without them the tests that ask for a page are
skipped. One browser serves all tests of a process and ends with it.
"""

import atexit
import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from functools import cache
from pathlib import Path

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--hide-scrollbars"]  # fmt: skip


def call(address, method="POST", **body):
    """One WebDriver command -> its value."""
    data = json.dumps(body).encode() if method == "POST" else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as reply:
        return json.load(reply)["value"]


@cache
def session():
    """Start the browser -> the address of its session; skips the test where there is none."""
    names = "chromium", "chromium-browser", "google-chrome"
    browser, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs chromium and chromedriver")
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    atexit.register(folder.cleanup)  # last of the three: atexit goes backwards
    atexit.register(process.kill)
    port = next(m[1] for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line)))
    options = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={folder.name}"]}
    url = f"http://127.0.0.1:{port}/session"
    url += "/" + call(url, capabilities={"alwaysMatch": {"goog:chromeOptions": options}})["sessionId"]
    atexit.register(call, url, "DELETE")
    return url


def devtools(command, **parameters):
    return call(f"{session()}/goog/cdp/execute", cmd=command, params=parameters)


def visit(page, width, height, dark):
    """Open a file as a phone (width below 600 pixels) or a desktop shows it."""
    device = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    devtools("Emulation.setDeviceMetricsOverride", **device)
    devtools("Emulation.setTouchEmulationEnabled", enabled=width < 600)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    devtools("Emulation.setEmulatedMedia", features=[scheme])
    call(f"{session()}/url", url=Path(page).resolve().as_uri())


def ask(page, script, width=1280, dark=False, height=800):
    """Open the file `page` and run a script in it, the body of a function -> what it returns (or its promise
    brings), as JSON gives it."""
    visit(page, width, height, dark)
    return call(f"{session()}/execute/sync", script=script, args=[])


def shoot(page, png, width=1280, height=0, dark=False):
    """Open the file `page` and write a picture of it; height 0 takes all of it."""
    visit(page, width, height or 800, dark)
    size = devtools("Page.getLayoutMetrics")["cssContentSize"]
    clip = dict(x=0, y=0, width=width, height=height or size["height"], scale=1)
    shot = devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    Path(png).write_bytes(base64.b64decode(shot["data"]))
