"""Pages in Chromium: what every page must hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECK = (Path(__file__).parent / "page_check.js").read_text()


def check_page(browser, url: str, after: Callable[[], Any] = lambda: None) -> None:
    """Assert what every page must hold, on two widths and in two colour schemes.

    Args:
        after: called when the page is loaded; returns when it is complete.
    """
    for width in (1280, 360):
        for scheme in ("light", "dark"):
            found = look(browser, url, width, scheme, after)
            where = f"{url} at {width} px, {scheme}"
            assert found["scrolls"] == 0, f"{where} scrolls sideways: {found['wide']}"
            assert not found["console"] and not found["requests"], (where, found["console"], found["requests"])
            assert not found["faint"], f"{where}: {found['faint']}"
            assert found["dark"] == (scheme == "dark")
            assert not found["roles"], f"{where}: {found['roles']}"


def check_in_browser(browser, path: Path) -> None:
    """Assert it of a file."""
    check_page(browser, path.as_uri())


def look(browser, url: str, width: int, scheme: str, after: Callable[[], Any]) -> dict:
    """Open a page as a device of a width and a colour scheme has it; return what page_check.js finds."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_of = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_of)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(url)
    after()
    found = browser.execute_script(CHECK)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    found["requests"] = [other for other in asked if not other.startswith(("data:", url))]
    found["console"] = [entry["message"] for entry in browser.get_log("browser")]
    return found
