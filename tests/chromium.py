"""A headless Chromium that tests press keys in, through its own debugging pipe."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Chromium reads commands from 3 and answers on 4.
_WIRED = """
import os, sys
os.dup2(int(sys.argv[1]), 63), os.dup2(int(sys.argv[2]), 64)
os.dup2(63, 3), os.dup2(64, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Navigated(Exception):
    """The page went to another document before it answered."""


class Page:
    """One page: `run` evaluates JavaScript, `press` is a real key; `events` are what it told."""

    def __init__(self, to: int, back: Any) -> None:
        self.to, self.back, self.count, self.session = to, back, 0, ""
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            raw = bytearray()
            while (byte := self.back.read(1)) != b"\0":
                assert byte, "Chromium is gone"
                raw += byte
            answer = json.loads(raw)
            if answer.get("id") == self.count:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Navigated
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, code: str) -> Any:
        how = {"returnByValue": True, "awaitPromise": True}
        found = self.send("Runtime.evaluate", expression=code, **how)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors on its console and what its policy forbade, from its beginning on."""
        for domain in ("Log", "Runtime"):
            self.send(f"{domain}.disable")
            self.send(f"{domain}.enable")
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        found = [json.dumps(e["params"]) for e in self.events if e["method"] in kinds]
        return [told for told in found if '"level": "verbose"' not in told]

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def until(self, code: str, want: Any = True, seconds: float = 10) -> None:
        end, found = time.monotonic() + seconds, None
        while True:
            with contextlib.suppress(Navigated):  # a reload is under way
                if (found := self.run(code)) == want:
                    return
            assert time.monotonic() < end, f"{code} is {found!r}, not {want!r}"
            time.sleep(0.02)

    def picture(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def opened(url: str, profile: Path) -> Iterator[Page]:
    """The page at `url`; skips the test where there is no Chromium."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command = [program, *flags, f"--user-data-dir={profile}", "--no-first-run", "about:blank"]
    browser = subprocess.Popen(
        [sys.executable, "-c", _WIRED, str(theirs_in), str(theirs_out), *command],
        pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        os.close(theirs_in)
        os.close(theirs_out)
        with os.fdopen(ours_in, "rb") as back:
            page = Page(ours_out, back)
            target = page.send("Target.createTarget", url="about:blank")["targetId"]
            attached = page.send("Target.attachToTarget", targetId=target, flatten=True)
            page.session = attached["sessionId"]
            page.send("Page.navigate", url=url)
            page.until(f"location.href.startsWith({url!r}) && document.readyState", "complete")
            yield page
    finally:
        os.close(ours_out)
        browser.terminate()
        browser.wait(10)
