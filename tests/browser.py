"""A headless Chromium that tests drive by its own protocol, over a pipe: no driver and no package is needed."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")


def find_chromium() -> str:
    """Path of a Chromium; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    return found


class Browser:
    """One page of a Chromium.

    Attributes:
      problems: errors and refusals that the page wrote to its console.
    """

    def __init__(self, process: subprocess.Popen, reading, writing):
        self._process, self._reading, self._writing = process, reading, writing
        self._number, self._session, self._events = 0, None, []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """The result of a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def wait_for(self, method: str, **expected) -> dict:
        """The parameters of the next event of this name that have these values."""
        while True:
            event = self._events.pop(0) if self._events else self._read(keep=False)
            if event.get("method") == method and expected.items() <= event["params"].items():
                return event["params"]

    def _read(self, keep: bool = True) -> dict:
        text = bytearray()
        while (byte := self._reading.read(1)) != b"\0":
            assert byte, f"Chromium ended with {self._process.wait()}"
            text += byte
        message = json.loads(text)
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(message["params"]["exceptionDetails"]["text"])
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.problems.append(message["params"]["entry"]["text"])
        if keep and "method" in message:
            self._events.append(message)
        return message

    def open(self, url: str) -> None:
        """Goes to a page and waits until it is there."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def evaluate(self, script: str):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key, as a person does."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)


@contextlib.contextmanager
def browser(profile: Path, downloads: Path) -> Generator[Browser]:
    """A Chromium with its own profile, which saves downloads in a folder."""
    chromium = find_chromium()
    theirs_read, ours_write = os.pipe()
    ours_read, theirs_write = os.pipe()
    command = [
        chromium,
        "--headless=new",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs_read} 4>&{theirs_write}', "bash", *command],
        pass_fds=(theirs_read, theirs_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_read)
    os.close(theirs_write)
    try:
        with open(ours_read, "rb") as reading, open(ours_write, "wb") as writing:
            made = Browser(process, reading, writing)
            made.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), eventsEnabled=True)
            yield made
            made.call("Browser.close")
    finally:
        process.kill()
        process.wait()
