"""A server in this process, and the log records of what it does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest
from structlog.testing import capture_logs

from .graphs.play import Stage, stage
from .harness import Server, graph_file, serving


class Serving(Protocol):
    def __call__(self, **settings: Any) -> AbstractAsyncContextManager[Server]: ...


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graph_file(tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def gates() -> Stage:
    """Where tests and nodes meet."""
    stage.reset()
    return stage


@pytest.fixture
def serve(source: Path, gates: Stage) -> Serving:
    """Servers with settings of their own."""

    def serve(**settings: Any) -> AbstractAsyncContextManager[Server]:
        return serving(settings.pop("source", source), **settings)

    return serve


@pytest.fixture
async def server(serve: Serving) -> AsyncIterator[Server]:
    async with serve() as server:
        yield server


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as records:
        yield records
