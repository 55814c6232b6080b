"""The page in a real browser, driven by WebDriver's own protocol: chromedriver and Chromium, headless."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import TOKEN, Live

DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the protocol gives elements
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,1200"]


class Browser:
    """A session of WebDriver."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}"
        options = {"goog:chromeOptions": {"args": FLAGS}, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self._root += f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        self._send("POST", "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        return self._send("POST", "/execute/sync", {"script": script, "args": list(args)})

    def find(self, css: str) -> str:
        return str(self._send("POST", "/element", {"using": "css selector", "value": css})[ELEMENT])

    def click(self, css: str) -> None:
        self._send("POST", f"/element/{self.find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        self._send("POST", f"/element/{self.find(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        return str(self._send("GET", f"/element/{self.find(css)}/text"))

    def wait(self, script: str, seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {script}")) and time.monotonic() < end:
            time.sleep(0.05)
        assert found, (script, self.text("body"))
        return found

    def complaints(self) -> list[str]:
        """What the browser says of the page: faults of scripts, what the policy forbids, what was not found."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._send("DELETE", "")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if DRIVER is None:
        pytest.skip("chromedriver is not installed (Debian: chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("browser")
    process = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home)},
    )  # fmt: skip
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        made = Browser(port)
        yield made
        made.close()
    finally:
        process.terminate()
        process.wait()


def rows(browser: Browser, table: str) -> list[list[str]]:
    script = (
        "return [...document.querySelector(arguments[0]).tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText))"
    )
    return [[str(cell) for cell in row] for row in browser.run(script, table)]


def test_a_person_asks_several_tasks_side_by_side(live: Live, browser: Browser) -> None:
    browser.open(f"http://{live.url}/")
    browser.wait("document.querySelectorAll('#tasks tbody tr').length === 9")
    assert [row[1] for row in rows(browser, "#tasks")][:3] == ["base (no task)", "sentiment", "topic"]
    assert rows(browser, "#tasks")[2][2] == "a, b, c"
    assert browser.run("return document.getElementById('go').disabled")
    for name in ("base", "sentiment", "t3"):
        browser.click(f"input[aria-label='{name}']")
    browser.type("#text", "a fine film")
    browser.click("#go")
    browser.wait("document.querySelectorAll('#answers tbody tr').length === 3")
    found = {row[0]: row[1] for row in rows(browser, "#answers")}
    for name, said in found.items():
        [right] = live.session.classify(["a fine film"], None if name == "base" else name)
        assert said == f"{right.label} ({right.score:.3f})"
    browser.wait(
        "document.getElementById('rate').innerText !== '0' && document.getElementById('p50').innerText !== '–'"
    )
    assert browser.text("#p50").endswith(" ms")
    assert browser.text("#total") == "8"
    assert browser.complaints() == []


def test_the_page_finds_tasks_and_follows_their_changes(
    live: Live, browser: Browser, task_file: Callable[..., Path]
) -> None:
    browser.open(f"http://{live.url}/")
    browser.type("#search", "T2")
    browser.wait("document.querySelectorAll('#tasks tbody tr').length === 2")
    assert rows(browser, "#tasks")[1][1] == "t2"
    reply = live.call(
        "PUT", "/admin/tasks/t2-new?labels=%3Cb%3Ex,y", task_file(5).read_bytes(), authorization=f"Bearer {TOKEN}"
    )
    assert reply.status == 201
    browser.wait("document.querySelectorAll('#tasks tbody tr').length === 3")
    assert rows(browser, "#tasks")[2][1:3] == ["t2-new", "<b>x, y"]  # shown, not obeyed
    browser.click("input[aria-label='t2-new']")
    live.session.remove_task("t2-new")
    browser.type("#text", "a fine film")
    browser.click("#go")
    browser.wait("document.querySelectorAll('#answers tbody tr.fault').length === 1")
    assert "there is no task 't2-new'" in rows(browser, "#answers")[0][1]


def test_a_late_answer_to_an_earlier_search_is_not_shown(live: Live, browser: Browser) -> None:
    browser.open(f"http://{live.url}/")
    browser.wait("document.querySelectorAll('#tasks tbody tr').length === 9")
    browser.run("""
        const real = window.fetch;
        window.late = 0;
        window.fetch = async (url) => {
            const answer = await real(url);
            if (!url.endsWith("=T")) return answer;
            await new Promise((done) => setTimeout(done, 500));
            window.late += 1;
            return answer;
        };
    """)
    browser.type("#search", "T2")
    browser.wait("window.late === 1")
    time.sleep(0.2)  # for the page to draw it, if it did
    assert [row[1] for row in rows(browser, "#tasks")] == ["base (no task)", "t2"]


def test_everything_the_page_needs_comes_from_this_server(live: Live) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        reply = live.call("GET", path)
        assert reply.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        assert b"http://" not in reply.body
        assert b"https://" not in reply.body
    status = live.call("GET", "/status?search=t1").json
    assert [task["name"] for task in status["tasks"]] == ["t1"]
    assert status["total"] == 8
