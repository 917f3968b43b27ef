"""Headless Chromium, driven by the DevTools protocol over two pipes: what a page says, asks for, and looks like."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ABSENT = "no Chromium: apt-get install chromium"
FLAGS = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
    ),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)
# The browser reads from descriptor 3 and writes to 4.
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str | None:
    """The browser, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page; what it logged and requested is collected while it is open."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._number, self._buffer = send, receive, 0, b""
        self.session = ""
        self.logged: list[str] = []
        self.requested: list[str] = []
        self._urls: dict[str, str] = {}  # by the number of the request
        self.loaded = False

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": arguments}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            received = os.read(self._receive, 1 << 20)
            assert received, "the browser has ended"
            self._buffer += received
        first, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(first)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled":
                self.logged.append(str([one.get("value") for one in parameters["args"]]))
            case "Runtime.exceptionThrown":
                self.logged.append(str(parameters["exceptionDetails"].get("text")))
            case "Log.entryAdded":
                self.logged.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self._urls[parameters["requestId"]] = parameters["request"]["url"]
                self.requested.append(parameters["request"]["url"])
            case "Network.loadingFailed" if "blockedReason" in parameters:  # the page may not ask for it
                self.requested.remove(self._urls[parameters["requestId"]])
            case "Page.javascriptDialogOpening":
                self.logged.append(f"dialog: {parameters['message']}")
            case "Page.loadEventFired":
                self.loaded = True
        return message

    def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Load a file and wait for it."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 60
        while not self.loaded and time.monotonic() < deadline:
            self._next()

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key on what has the focus."""
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13}[key]
            more = {"windowsVirtualKeyCode": code, "text": chr(code)} if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a browser of its own, whose profile is in a folder."""
    program = chromium()
    assert program, ABSENT
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    start = [sys.executable, "-c", START, str(their_in), str(their_out)]
    command = [*start, program, *FLAGS, f"--user-data-dir={profile}"]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=(their_in, their_out), stdout=log, stderr=log)
    os.close(their_in)
    os.close(their_out)
    page = Page(our_out, our_in)
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(our_out)
        os.close(our_in)
