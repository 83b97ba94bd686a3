"""Headless Chromium for tests that look at a page: what a script in it returns.

Needs the programs `chromium` and `chromedriver` (Debian: apt-get install chromium chromium-driver) and no
Python package: chromedriver is spoken to over HTTP. Without them the tests that ask for a page are skipped.
One browser serves all tests of a process and ends with it.
"""

import atexit
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from functools import cache
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--hide-scrollbars"]  # fmt: skip


def webdriver(address, method="POST", **body):
    """One WebDriver command -> its value."""
    data = json.dumps(body).encode() if method == "POST" else None
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, data, headers, method=method)
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with no_proxy.open(request, timeout=120) as reply:
        return json.load(reply)["value"]


@cache
def session():
    """Start the browser -> the address of its session; skips the test where there is none."""
    found = [path for path in map(shutil.which, BROWSERS) if path]
    driver = shutil.which("chromedriver")
    if not found or not driver:
        pytest.skip("needs chromium and chromedriver")
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    atexit.register(folder.cleanup)  # last of the three: atexit goes backwards
    atexit.register(process.kill)
    url = f"http://127.0.0.1:{read_port(process.stdout)}/session"
    options = {"binary": found[0], "args": [*FLAGS, f"--user-data-dir={folder.name}"]}
    capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
    url += "/" + webdriver(url, capabilities=capabilities)["sessionId"]
    atexit.register(webdriver, url, "DELETE")
    return url


def read_port(lines):
    """The port that chromedriver prints when it is ready."""
    for line in lines:
        match = re.search(r"successfully on port (\d+)", line)
        if match:
            return match[1]
    raise RuntimeError("chromedriver ended before it was ready")


def devtools(command, **parameters):
    return webdriver(f"{session()}/goog/cdp/execute", cmd=command, params=parameters)


def open_page(page, width, height, dark):
    """Open a file as a phone (width below 600 pixels) or a desktop shows it."""
    phone = width < 600
    device = dict(width=width, height=height, deviceScaleFactor=1, mobile=phone)
    devtools("Emulation.setDeviceMetricsOverride", **device)
    devtools("Emulation.setTouchEmulationEnabled", enabled=phone)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    devtools("Emulation.setEmulatedMedia", features=[scheme])
    webdriver(f"{session()}/url", url=Path(page).resolve().as_uri())


def run_script(script):
    """Run a script in the open page, the body of a function -> what it returns (or its promise), as JSON."""
    return webdriver(f"{session()}/execute/sync", script=script, args=[])
