"""A real TensorBoard on a run that was killed and resumed, seen in a real browser.

The browser is Chromium, spoken to by the W3C WebDriver protocol: JSON over HTTP, no client needed.
"""

from __future__ import annotations

import base64
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from tests.test_board import SCORED, STEPS, killed_and_resumed

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1400,2400",
    "--disable-dev-shm-usage",
)
SECONDS = 120.0
FIND = """
const found = [];
const walk = root => {
  for (const element of root.querySelectorAll('*')) {
    if (element.matches(arguments[0])) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
};
walk(document);
"""
"""All elements of a selector, in shadow trees, too."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for(what: str, look: Callable[[], Any]) -> Any:
    """What ``look`` returns as soon as it is true."""
    end, last = time.monotonic() + SECONDS, None
    while time.monotonic() < end:
        try:
            if found := look():
                return found
            last = found
        except OSError as error:  # not listening yet
            last = error
        time.sleep(0.2)
    pytest.fail(f"{what}: nothing within {SECONDS:.0f} s, at last {last!r}")


@contextmanager
def process(*command: str | Path) -> Iterator[None]:
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([str(part) for part in command], **quiet) as child:
        try:
            yield
        finally:
            child.send_signal(signal.SIGTERM)  # so that it ends its own children
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, port: int, profile: Path) -> None:
        self._root = f"http://127.0.0.1:{port}"
        wait_for("chromedriver", lambda: self._ask("GET", "/status"))
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._root + path, data, {"Content-Type": "application/json"})
        request.method = method
        with urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        """A new document: with a change behind # alone the old one would stay."""
        for page in ("about:blank", url):
            self._ask("POST", f"{self._session}/url", {"url": page})

    def find(self, selector: str, get: str) -> list[Any]:
        """Of every element, in shadow trees, too, what the JavaScript ``get`` makes of ``e``."""
        script = f"{FIND} return found.map(e => {get});"
        body = {"script": script, "args": [selector]}
        found: list[Any] = self._ask("POST", f"{self._session}/execute/sync", body)
        return found

    def save(self, path: Path) -> None:
        """A screenshot."""
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", self._session)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, killed five steps and an evaluation after a checkpoint, and resumed."""
    folder = tmp_path_factory.mktemp("run")
    killed_and_resumed(folder, 10)
    return folder


@contextmanager
def tensorboard(folder: Path, fast: str) -> Iterator[str]:
    """Its address, once it has read the whole run."""
    port = free_port()
    at = ("--port", str(port), "--host", "127.0.0.1", "--load_fast", fast)
    logs = ("--logdir", folder / "tensorboard")
    with process(sys.executable, "-m", "tensorboard.main", *logs, *at):
        address = f"http://127.0.0.1:{port}"
        asked = "scalars/scalars", "val/dice_best"  # the last one that is written
        wait_for("TensorBoard", lambda: ask(address, *asked))
        yield address


def ask(address: str, what: str, tag: str) -> Any:
    url = f"{address}/data/plugin/{what}?run=.&tag={quote(tag, safe='')}"
    try:
        with urlopen(url, timeout=SECONDS) as answer:
            return json.load(answer)
    except ValueError:
        return None  # no JSON yet


@pytest.mark.parametrize("fast", ["false", "true"])
def test_both_readers_of_tensorboard_see_each_step_once(folder: Path, fast: str) -> None:
    """The one of Python hides what `purge_step` says, the fast one what is written once more."""
    with tensorboard(folder, fast) as address:
        for tag in ("train/loss", "train/lr/head", "perf/images_per_s", "stage/index"):
            points = ask(address, "scalars/scalars", tag)
            assert [step for _, step, _ in points] == list(range(1, STEPS + 1)), tag
        for tag in ("val/dice_mean", "val/dice/square", "val/ece"):
            assert [step for _, step, _ in ask(address, "scalars/scalars", tag)] == SCORED, tag
        images = ask(address, "images/images", "val/case/worst")
        assert [image["step"] for image in images] == SCORED
        curves = ask(address, "pr_curves/pr_curves", "val/pr/square")["."]
        assert [curve["step"] for curve in curves] == SCORED
        texts = ask(address, "text/text", "stage/text_summary")
        assert [text["step"] for text in texts] == [1, 5]


@pytest.fixture(scope="module")
def browser(
    need: Callable[[str, bool, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    hint = "apt install chromium chromium-driver"
    need("browser", CHROMIUM is not None and DRIVER is not None, hint)
    port = free_port()
    with process(str(DRIVER), f"--port={port}"):
        browser = Browser(port, tmp_path_factory.mktemp("profile"))
        yield browser
        browser.close()


TEXT = "(e.shadowRoot || e).textContent"
LINES = "[...e.shadowRoot.querySelectorAll('path.line')].map(p => p.getAttribute('d') || '')"


def drawn(browser: Browser, charts: int) -> list[list[str]]:
    """The paths of the curves of all charts, none while there are fewer charts or empty ones."""
    found = browser.find("vz-line-chart2", LINES)
    full = [paths for paths in found if any(len(path) > 10 for path in paths)]
    return full if len(full) >= charts else []


def test_the_pages_are_filled(browser: Browser, folder: Path, tmp_path: Path) -> None:
    def shown(page: str, look: Callable[[], Any]) -> Any:
        browser.open(f"{address}/#{page}")
        found = wait_for(page, look)
        browser.save(tmp_path / f"{page.split('&', maxsplit=1)[0]}.png")
        return found

    with tensorboard(folder, "false") as address:
        shown("scalars&tagFilter=train|val%2F", lambda: drawn(browser, 12))
        tags = browser.find("tf-scalar-card", "e.tag")
        assert {"train/loss", "train/grad_norm", "val/dice_mean", "val/dice/square"} <= set(tags)
        longest = max(len(path) for paths in drawn(browser, 12) for path in paths)
        assert longest > 10 * STEPS  # a curve through all points, not a dot

        def loaded() -> list[list[Any]]:
            size = "[e.naturalWidth, e.naturalHeight]"
            found = browser.find("img", size)
            return found if len(found) == 5 and all(w and h for w, h in found) else []

        assert [640, 1320] in shown("images", loaded)
        names = browser.find("tf-image-loader", "e.tag")
        assert {"val/case/worst", "val/case/best", "val/confusion", "val/reliability"} <= set(names)

        curves = shown("custom_scalars", lambda: drawn(browser, 6))
        assert max(len(paths) for paths in curves) >= 3  # three terms of the loss in one chart
        assert len(shown("pr_curves", lambda: drawn(browser, 1))) == 1

        def said(*words: str) -> bool:
            text = " ".join(browser.find("tf-markdown-view", TEXT))
            return all(word in text for word in words)

        assert shown("text", lambda: said("test_resnet", "f00d"))  # config, hash of the manifest

        def table() -> bool:
            cells = browser.find("vaadin-grid-cell-content", "e.textContent.trim()")
            return {"loss/class_weights", "median_frequency"} <= set(cells)

        assert shown("hparams", table)
