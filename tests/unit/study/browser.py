"""Headless Chromium, by way of its DevTools protocol over a pipe: no driver and no port."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab. `events`: what it has reported, as DevTools names it, since the last `open`."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
        moved = f'exec "$@" 3<&{commands} 4>&{answers} 2>/dev/null'  # the pipe's two ends are 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", program, *flags.split(), f"--user-data-dir={profile}"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._rest, self._calls, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command. Raises RuntimeError with the browser's reason."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, url: str, width: int, scheme: Literal["light", "dark"] = "light", height: int = 900) -> None:
        """Returns when the page is loaded, with everything that it asked for."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self("Page.navigate", url=url)
        self.wait(lambda event: event.get("method") == "Page.loadEventFired")

    def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Until such an event has come since the last `open`."""
        while not any(map(wanted, self.events)):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        text = "\r" if key == "Enter" else ""
        self("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, text=text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions of scripts."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            match event.get("method"):
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    found.append(str(params["args"]))
                case "Runtime.exceptionThrown":
                    found.append(str(params["exceptionDetails"]))
                case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                    found.append(params["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path, whole: bool = False) -> None:
        picture = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        self._session = ""
        with suppress(OSError, EOFError):
            self("Browser.close")
        os.close(self._commands)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._answers, 1 << 20)
            if not more:
                raise EOFError("Chromium has ended")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    program = chromium()
    assert program is not None
    browser = Browser(program, profile)
    try:
        yield browser
    finally:
        browser.close()


def sideways(browser: Browser) -> Sequence[Any]:
    """(how wide the page is, how wide the window is, elements that stick out of it and scroll in no box)."""
    return browser.run("""(() => {
      const root = document.documentElement, wide = root.clientWidth;
      const out = [...document.querySelectorAll("body *")].filter(each => !each.closest(".box, pre")
        && each.getBoundingClientRect().right > wide + 0.5).map(each => each.tagName + "." + each.className);
      return [Math.max(root.scrollWidth, document.body.scrollWidth), wide, out];
    })()""")
