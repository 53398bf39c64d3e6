"""A headless Chromium, spoken to over its DevTools pipe, so that nothing but the browser itself is needed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--mute-audio")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")


class Browser:
    """One tab. What it asks the network for and what it complains about is in `requests` and `complaints`."""

    def __init__(self) -> None:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # its last processes may still write
        to_them, self.write = os.pipe()
        self.read, from_them = os.pipe()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        argv = [str(FOUND), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}", "about:blank"]
        shell = f'exec "$@" 3<&{to_them} 4>&{from_them}'  # the pipe is its files 3 and 4
        self.process = subprocess.Popen(["bash", "-c", shell, "bash", *argv], pass_fds=(to_them, from_them), **quiet)
        os.close(to_them)
        os.close(from_them)
        self.left, self.number, self.session = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        tabs = self("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in tabs if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self.speak("en-US")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self.number:
                assert "error" not in told, told
                return told["result"]

    def open(self, page: Path | str, width: int = 1200, height: int = 900, **media: str) -> None:
        """`page` is a file or a URL; `media`: media="print", or a feature such as prefers_color_scheme="dark"."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        features = [{"name": n.replace("_", "-"), "value": v} for n, v in media.items() if n != "media"]
        self("Emulation.setEmulatedMedia", media=media.get("media", ""), features=features)
        self("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def speak(self, language: str) -> None:
        """The language that pages are told from now on."""
        self("Emulation.setUserAgentOverride", userAgent="Mozilla/5.0", acceptLanguage=language)

    def ask(self, expression: str) -> Any:
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def point(self, selector: str, across: float, down: float) -> None:
        """Move the mouse to a place in the first element of a selector, given as fractions of its size."""
        found = f"document.querySelector({selector!r})"
        self.ask(f"{found}.scrollIntoView({{block: 'center'}})")
        place = f"(r => [r.x + r.width * {across}, r.y + r.height * {down}])({found}.getBoundingClientRect())"
        x, y = self.ask(place)
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, file: Path) -> None:
        """All of the page, however long."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        return base64.b64decode(self("Page.printToPDF", preferCSSPageSize=True)["data"])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.write)
        os.close(self.read)
        self.profile.cleanup()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            piece = os.read(self.read, 1 << 16)
            assert piece, "the browser has gone"
            self.left += piece
        line, _, self.left = self.left.partition(b"\0")
        told = json.loads(line)
        method, params = told.get("method"), told.get("params", {})
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"][:200])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(params))
        return told
