from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from server import Server, Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def serving(tmp_path: Path, zygote: Zygote) -> Iterator[Callable[..., Server]]:
    """Makes servers, each in a folder of its own; they end with the test."""
    with ExitStack() as stack:
        count = 0

        def make(*sources: str, forked: bool = True, **env: str) -> Server:
            nonlocal count
            count += 1
            folder = tmp_path / f"server-{count}"
            return stack.enter_context(Server(folder, zygote if forked else None, *sources, **env))

        yield make


@pytest.fixture
def server(serving: Callable[..., Server]) -> Server:
    """A server with the graphs of this folder, started."""
    return serving().start()


def pytest_make_parametrize_id(config: Any, val: object) -> str | None:
    return val if isinstance(val, str) else None
