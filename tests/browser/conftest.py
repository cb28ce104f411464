"""A real browser before a real server."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "process"))

from server import GRAPHS, Server, Zygote  # noqa: E402

SOURCES = ("--config", str(HERE / "langgraph.json"), *GRAPHS)
IMAGES = HERE.parent.parent / "docs" / "images" / "page"
SIZE = {"width": 1280, "height": 860}

Opening = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = os.environ.get("SERENO_CHROMIUM") or shutil.which("chromium")
    assert program, "no chromium: apt-get install chromium, or set SERENO_CHROMIUM"
    with sync_playwright() as playwright:
        # Containers have no user namespaces for the sandbox, and only this page is opened.
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def server(tmp_path: Path, zygote: Zygote) -> Iterator[Server]:
    with Server(tmp_path / "server", zygote, *SOURCES) as server:
        yield server.start()


@pytest.fixture
def opening(browser: Browser, server: Server) -> Iterator[Opening]:
    """Opens pages; each may ask nobody but the server, and none may complain."""
    contexts = []
    complaints: list[str] = []

    def complain(text: str) -> None:
        # Chromium tells of every answer that is an error; what the page makes of it is tested.
        if not text.startswith("Failed to load resource") and "net::ERR_" not in text:
            complaints.append(text)

    def open_page(path: str = "/", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": SIZE, **options})
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complain(f"{error}\n{error.stack}"))
        page.on("console", lambda said: said.type in ("error", "warning") and complain(said.text))
        page.on(
            "request",
            lambda asked: asked.url.startswith(server.url) or complain(f"asked {asked.url}"),
        )
        page.goto(server.url + path)
        page.wait_for_selector(".view")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def picture() -> Callable[[Page, str], None]:
    """Writes what is seen into docs/images."""

    def take(page: Page, name: str) -> None:
        IMAGES.mkdir(parents=True, exist_ok=True)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=IMAGES / f"{name}.png", animations="disabled")

    return take
