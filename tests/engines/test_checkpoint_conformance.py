"""LangGraph's own conformance suite against the savers of every engine; nothing is skipped."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from engine_kit import OPENERS, Bench, claimed
from langgraph.checkpoint.conformance import checkpointer_test, validate

from runtime.engines import ENGINES

#: Fork and retention come later.
LATER = {"copy_thread", "prune", "delete_for_runs"}
#: Tests of the suite that ran when this was written: it may grow, never shrink in silence.
TESTS = {"put": 17, "put_writes": 10, "get_tuple": 10, "list": 16, "delete_thread": 5}


def test_every_engine_has_an_opener() -> None:
    assert set(OPENERS) == set(ENGINES)


@pytest.mark.parametrize("scheme", sorted(ENGINES))
async def test_its_saver_is_all_that_langgraph_asks_for(scheme: str, tmp_path: Path) -> None:
    async def saver() -> AsyncGenerator[Any, None]:
        async with contextlib.AsyncExitStack() as stack:
            directory = Path(tempfile.mkdtemp(dir=tmp_path))
            engine = await Bench(scheme, directory, stack).open()
            yield engine.checkpointer(await claimed(engine))

    report = await validate(checkpointer_test(name=scheme)(saver))

    results = report.results
    assert {name: result.failures for name, result in results.items() if result.failures} == {}
    assert report.passed_all_base()
    assert report.conformance_level() == "FULL"
    assert {name for name, result in results.items() if result.detected} == set(TESTS)
    assert {name for name, result in results.items() if not result.detected} == LATER
    for name, tests in TESTS.items():
        assert results[name].passed is True
        assert results[name].tests_passed >= tests
        assert results[name].tests_skipped == 0
