"""Every engine of the table, each over a store of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from engine_kit import OPENERS, Bench, Clock

from runtime.engines import ENGINES
from runtime.engines.base import Engine


@pytest.fixture(params=sorted(ENGINES))
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    if request.param not in OPENERS:
        pytest.fail(f"engine {request.param!r} is in the table and has no opener in engine_kit.py")
    async with contextlib.AsyncExitStack() as stack:
        yield Bench(request.param, tmp_path, stack)


@pytest.fixture
async def engine(bench: Bench) -> Engine:
    return await bench.open()


@pytest.fixture
def clock(bench: Bench) -> Clock:
    return bench.clock
