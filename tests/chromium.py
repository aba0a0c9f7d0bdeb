"""Chromium without a window, told over a pipe what to do, in the protocol that its developer tools speak."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-extensions",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
]


class Chromium:
    """A browser with one page.

    Attributes
    ----------
    events : list of dict
        All that it has said unasked.
    """

    def __init__(self, reader: Any, writer: Any) -> None:
        self._reader, self._writer = reader, writer
        self._number, self._session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> Any:
        """Has it do something, and waits for the result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path) -> None:
        """Shows a file; forgets what was said before."""
        self.events.clear()
        self.do("Page.navigate", url=path.as_uri())
        while not any(each["method"] == "Page.loadEventFired" for each in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def look(self, *, width: int = 1280, height: int = 800, media: str = "screen", scheme: str = "light") -> None:
        """Sets the size of the window, and what the page is shown on."""
        phone = width < 600
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.do("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def _next(self) -> Any:
        parts = bytearray()
        while not parts.endswith(b"\0"):
            part = self._reader.read1(1 << 20) if self._reader.peek(1).find(b"\0") < 0 else self._until_zero()
            assert part, "Chromium ended"
            parts += part
        return json.loads(parts[:-1])

    def _until_zero(self) -> bytes:
        return bytes(self._reader.read(self._reader.peek(1).find(b"\0") + 1))


@contextlib.contextmanager
def chromium() -> Iterator[Chromium]:
    """Starts it, and ends it with the block."""
    assert PATH is not None
    to_read, its_output = os.pipe()
    its_input, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        redirect = f'exec "$@" 3<&{its_input} 4>&{its_output}'  # sh knows no file descriptors above 9
        command = ["bash", "-c", redirect, "bash", PATH, *_OPTIONS, f"--user-data-dir={folder}"]
        process = subprocess.Popen(command, pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL)
        for each in (its_input, its_output):
            os.close(each)
        with os.fdopen(to_read, "rb") as reader, os.fdopen(to_write, "wb") as writer:
            try:
                browser = Chromium(reader, writer)
                yield browser
                browser._session = ""
                browser.do("Browser.close")
            finally:
                process.kill()
                process.wait()
