"""The page in a real browser: headless Chromium, spoken to by the DevTools protocol."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adversa.report import page

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is on the path"
    ),
]
PATIENCE = 120  # seconds for the browser to start, or to load the page, on a machine that is busy
HEARD = (
    "Runtime.consoleAPICalled",
    "Runtime.exceptionThrown",
    "Log.entryAdded",
    "Audits.issueAdded",
)
SHOWN = "[...document.querySelectorAll('.one')].filter(e => e.checkVisibility()).length"
CASES = "[...document.querySelectorAll('.case')].filter(e => e.checkVisibility()).length"


class Tab:
    """Commands to a tab, and what it said meanwhile: messages of its console, faults, violations of
    its policy.
    """

    def __init__(self, socket: Any) -> None:
        self.socket, self.sent, self.said = socket, 0, []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params})
        while True:
            answer = json.loads((await asyncio.wait_for(self.socket.receive(), PATIENCE)).data)
            if answer.get("id") == self.sent:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if answer.get("method") in HEARD:
                self.said.append(answer)

    async def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression. It runs beside the page's policy, which allows no
        script of its own.
        """
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def open(self, path: Path, width: int, scheme: str = "light") -> None:
        narrow = width < 600
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=narrow,
        )
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        await self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while (
            await self.ask("document.readyState + location.pathname") != f"complete{path.resolve()}"
        ):
            assert time.monotonic() < end, "the page did not load"
            await asyncio.sleep(0.1)

    async def press(self, key: str, code: int, text: str = "") -> None:
        down = {
            "type": "keyDown" if text else "rawKeyDown",
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": code,
        }
        await self.call("Input.dispatchKeyEvent", **down, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", **(down | {"type": "keyUp"}))


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Tab]:
    import aiohttp

    words = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
    ]
    words += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        [str(CHROMIUM), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port, end = profile / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (port.exists() and "\n" in port.read_text()):
            assert process.poll() is None and time.monotonic() < end, "the browser did not start"
            await asyncio.sleep(0.1)
        async with aiohttp.ClientSession() as session:
            async with session.get(
                f"http://127.0.0.1:{port.read_text().split()[0]}/json"
            ) as answer:
                target = next(t for t in await answer.json() if t["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Audits"):
                    await tab.call(f"{domain}.enable")
                yield tab
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browse(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Callable[[Tab], Coroutine[Any, Any, None]]], None]:
    def run(work: Callable[[Tab], Coroutine[Any, Any, None]]) -> None:
        async def within() -> None:
            async with chromium(tmp_path_factory.mktemp("chromium")) as tab:
                await work(tab)

        asyncio.run(within())

    return run


@pytest.fixture(scope="module")
def report(make_run: Callable[..., Path]) -> Path:
    return page.write(make_run(cases=12, per_case=6))


def test_it_fits_and_loads_without_a_word(report: Path, browse: Callable[..., None]) -> None:
    async def work(tab: Tab) -> None:
        for width in (375, 1440):
            for scheme in ("light", "dark"):
                await tab.open(report, width, scheme)
                assert await tab.ask("document.documentElement.scrollWidth") <= width
                assert (
                    await tab.ask("window.innerWidth") == width
                )  # a page too wide is zoomed out on a phone
                images = await tab.ask(
                    "[...document.images].map(i => [i.complete, i.naturalWidth, i.width])"
                )
                assert len(images) > 100 and all(
                    done and wide > 0 and shown > 20 for done, wide, shown in images
                )
                dark = await tab.ask("getComputedStyle(document.body).backgroundColor")
                assert dark == {"light": "rgb(251, 250, 247)", "dark": "rgb(20, 24, 26)"}[scheme]
        assert tab.said == []

    browse(work)


def test_a_page_that_is_at_fault_is_noticed(
    report: Path, tmp_path: Path, browse: Callable[..., None]
) -> None:
    """The checks above can fail: a script, a picture from elsewhere and a line too wide are all
    seen.
    """
    bad = tmp_path / "bad.html"
    wide = (
        "<div style='width: 2000px'>x</div><script>1</script><img src='file:///nowhere.png'></main>"
    )
    bad.write_text(report.read_text().replace("</main>", wide))

    async def work(tab: Tab) -> None:
        await tab.open(bad, 1440)
        assert await tab.ask("document.documentElement.scrollWidth") > 1440
        assert not await tab.ask("[...document.images].every(i => i.naturalWidth > 0)")
        assert "Content Security Policy" in json.dumps(
            tab.said
        ) or "ContentSecurityPolicy" in json.dumps(tab.said)

    browse(work)


def test_the_keyboard_reaches_the_filter_and_works_it(
    report: Path, browse: Callable[..., None]
) -> None:
    async def work(tab: Tab) -> None:
        await tab.open(report, 1440)
        everything, cases = await tab.ask(SHOWN), await tab.ask(CASES)
        assert everything > 70 and cases > 12
        for _ in range(80):
            await tab.press("Tab", 9)
            if await tab.ask("document.activeElement.name") == "by-class":
                break
        assert await tab.ask("document.activeElement.id") == "c-all"
        assert (
            await tab.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        )  # the focus is seen
        await tab.press("ArrowDown", 40)
        assert await tab.ask("document.activeElement.id") == "c-0"
        of_class = await tab.ask(SHOWN)
        assert 0 < of_class < everything and 0 < await tab.ask(CASES) < cases
        assert await tab.ask(
            "[...document.querySelectorAll('.case.c1, .case.c2')].every(e => !e.checkVisibility())"
        )
        await tab.press("Tab", 9)
        assert await tab.ask("document.activeElement.id") == "r-all"
        await tab.press("ArrowDown", 40)
        kept = await tab.ask(SHOWN)
        assert 0 < kept < of_class
        assert await tab.ask(
            "[...document.querySelectorAll('.one.refused')].every(e => !e.checkVisibility())"
        )
        await tab.press("ArrowDown", 40)
        assert (
            await tab.ask("document.activeElement.id") == "r-refused"
            and await tab.ask(SHOWN) == of_class - kept
        )
        await tab.ask("document.querySelector('#c-all').focus()")
        await tab.press(" ", 32, " ")
        assert (
            await tab.ask("document.querySelector('#c-all').checked")
            and await tab.ask(SHOWN) > of_class - kept
        )
        assert tab.said == []

    browse(work)


def test_what_matches_nothing_is_said_and_paper_shows_all(
    report: Path, browse: Callable[..., None]
) -> None:
    async def work(tab: Tab) -> None:
        await tab.open(report, 1440)
        everything = await tab.ask(SHOWN)
        nothing = "document.querySelector('.nothing').checkVisibility()"
        await tab.ask(
            "document.querySelector('#c-1').click(), document.querySelector('#r-refused').click()"
        )
        assert not await tab.ask(nothing)
        await tab.ask(
            "document.querySelectorAll('.c1 .one.refused')"
            ".forEach(e => e.classList.remove('refused'))"
        )
        assert await tab.ask(SHOWN) == 0 and await tab.ask(nothing)
        await tab.call("Emulation.setEmulatedMedia", media="print")
        assert await tab.ask(SHOWN) == everything and not await tab.ask(nothing)
        assert not await tab.ask("document.querySelector('.filters').checkVisibility()")

    browse(work)
