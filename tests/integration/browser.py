"""A real browser without a screen."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
PATIENCE = 90.0
"""Seconds that a page may take to show what is waited for."""


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.fail("no Chromium on this machine: apt-get install -y chromium (or deselect with -m 'not browser')")


def browse(page: Path | str, profile: Path, *flags: str) -> str:
    """Open a file or an address in a fresh browser and return what it printed."""
    address = page if isinstance(page, str) else page.as_uri()
    command = [_browser(), *FLAGS, "--window-size=1100,2400", f"--user-data-dir={profile}", *flags, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


class Page:
    """A page that is told what to do, by Chrome's DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._last = socket, 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events are passed over."""
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        while True:
            said = await self._socket.receive_json(timeout=PATIENCE)
            if said.get("id") == self._last:
                assert "error" not in said, said
                return dict(said["result"])

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, script: str) -> Any:
        """The first value that means yes."""
        deadline = time.monotonic() + PATIENCE
        while not (value := await self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}; the page: {await self.run(TEXT)}"
            await asyncio.sleep(0.3)
        return value

    async def text(self, *words: str) -> str:
        """What the page says, once it says all of these words."""
        await self.until(f"{json.dumps(words)}.every(word => {TEXT}.includes(word))")
        return str(await self.run(TEXT))

    async def click(self, element: str) -> None:
        """Press and release the mouse in the middle of an element, once it is there."""
        await self.until(f"!!({element})")
        await self.run(f"({element}).scrollIntoView({{block: 'nearest', inline: 'nearest'}})")
        x, y = await self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(({element}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    async def picture(self, path: Path) -> None:
        """What can be seen, as a PNG."""
        found = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


TEXT = "(document.body ? document.body.innerText : '')"


def drive(address: str, profile: Path, act: Callable[[Page], Awaitable[None]], size: tuple[int, int]) -> None:
    """Open an address in a fresh browser and do something there."""
    asyncio.run(_drive(address, profile, act, size))


async def _drive(address: str, profile: Path, act: Callable[[Page], Awaitable[None]], size: tuple[int, int]) -> None:
    flags = ["--remote-debugging-port=0", f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]
    browser = subprocess.Popen([_browser(), *FLAGS, *flags, "about:blank"], stderr=subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{await _port(profile)}/json/list") as answer:
                (page,) = [one for one in await answer.json(content_type=None) if one["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                opened = Page(socket)
                await opened.call("Page.navigate", url=address)
                await act(opened)
    finally:
        browser.terminate()
        browser.wait(30)


async def _port(profile: Path) -> int:
    """Of the protocol, once the browser has written it down."""
    deadline, file = time.monotonic() + PATIENCE, profile / "DevToolsActivePort"
    while not file.exists() or "\n" not in file.read_text():
        assert time.monotonic() < deadline, "Chromium opened no port for its DevTools protocol"
        await asyncio.sleep(0.1)
    return int(file.read_text().split()[0])
