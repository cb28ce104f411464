"""The self-test finds each way in which the seam can be broken, and `observe` acts on it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextvars import Context
from typing import Any

import pytest
from langgraph.pregel import _retry, _runner
from langgraph.pregel._loop import PregelLoop
from langgraph.pregel._read import PregelNode
from structlog.testing import capture_logs

from telemetry import langgraph as seam
from telemetry import wrapping
from telemetry.langgraph import SeamMismatch, current_attempt, install, uninstall
from telemetry.observations import current_listener
from telemetry.selftest import observe, problems
from telemetry.wrapping import wrap


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    uninstall()


@pytest.fixture
def installed() -> None:
    install()


async def test_nothing_is_wrong_with_the_seam_nor_with_wrapped_nodes() -> None:
    wrapped = await problems(wrap)
    install()

    assert wrapped == []
    assert await problems() == []


async def test_the_self_test_leaves_nothing_behind(installed: None) -> None:
    seen: list[Any] = []
    token = current_listener.set(seen.append)
    others = asyncio.all_tasks()
    await problems()
    current_listener.reset(token)

    assert seen == []
    assert current_attempt.get() is None
    assert asyncio.all_tasks() == others


async def test_a_seam_that_is_not_installed_sees_nothing() -> None:
    (first, *_) = await problems()

    assert "instead of 'flaky 1 starts'" in first


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_runner, "arun_with_retry"),
        (_runner, "run_with_retry"),
        (PregelLoop, "output_writes"),
        (PregelLoop, "after_tick"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
async def test_a_function_that_langgraph_does_not_call_is_missed(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(owner, name)
    install()
    monkeypatch.setattr(owner, name, original)

    assert await problems()


async def test_a_proxy_that_is_not_called_is_missed(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def past_us(self: Any, value: Any, config: Any = None, **kwargs: Any) -> Any:
        return await self._proc.ainvoke(value, config, **kwargs)

    monkeypatch.setattr(seam._Proxy, "ainvoke", past_us)
    (first, *_) = await problems()

    assert first == "saw 'in no attempt' and 2 more instead of 'flaky 1 starts' and 7 more"


async def test_a_policy_that_is_not_found_is_missed(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam._Proxy, "_policy", lambda self, exc: None)

    assert await problems() == ["saw 'flaky 1 failed' instead of 'flaky 1 retried' and 1 more"]


async def test_a_lost_context_is_missed(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a LangGraph that calls each node in a context of its own."""
    node = PregelNode.node.func  # type: ignore[attr-defined]

    class Elsewhere:
        def __init__(self, proc: Any) -> None:
            self._proc = proc

        def __getattr__(self, name: str) -> Any:
            return getattr(self._proc, name)

        async def ainvoke(self, value: Any, config: Any, **kwargs: Any) -> Any:
            body = self._proc.ainvoke(value, config, **kwargs)
            return await asyncio.create_task(body, context=Context())

    monkeypatch.setattr(PregelNode, "node", property(lambda self: Elsewhere(node(self))))
    wrong = await problems()

    assert "saw 'in no attempt' instead of 'in flaky 1'" in wrong


async def test_a_self_test_that_hangs_is_given_up(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(self: Any, *args: Any, **kwargs: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(seam._Proxy, "ainvoke", hangs)

    assert await problems(limit_s=0.05) == ["the self-test took longer than 0.05 s"]


async def test_a_self_test_that_breaks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(graph: Any) -> Any:
        raise RuntimeError("broken")

    assert await problems(breaks) == ["the self-test failed: RuntimeError: broken"]


async def test_a_server_observes_by_the_seam_alone_when_it_fits() -> None:
    with capture_logs() as logs:
        chosen = await observe()

    assert chosen is None
    assert seam._installed
    assert logs == []


@pytest.mark.parametrize("owner_name", list(seam._EXPECTED), ids=[n for _, n in seam._EXPECTED])
async def test_a_langgraph_that_we_do_not_know_has_its_nodes_wrapped(
    owner_name: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it does the same, and could be told more."""
    owner, name = owner_name
    original = getattr(owner, name)
    if asyncio.iscoroutinefunction(original):

        async def changed(*args: Any, more: None = None, **kwargs: Any) -> Any:
            return await original(*args, **kwargs)
    else:

        def changed(*args: Any, more: None = None, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, changed)
    with capture_logs() as logs:
        chosen = await observe()

    assert chosen is wrap
    assert seam._installed == []
    assert getattr(owner, name) is changed
    (record,) = logs
    assert record["log_level"] == "warning"
    assert record["event_type"] == "telemetry.degraded"
    assert name in record["reason"]
    assert record["remedy"] == "install the langgraph of requirements.lock"


async def test_a_seam_that_fits_and_sees_nothing_is_taken_out_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seam, "_observed_async", lambda original: original)
    before = (_runner.arun_with_retry, _retry._arun_with_timeout)  # type: ignore[attr-defined]
    with capture_logs() as logs:
        chosen = await observe()

    assert chosen is wrap
    assert (_runner.arun_with_retry, _retry._arun_with_timeout) == before  # type: ignore[attr-defined]
    assert [record["event_type"] for record in logs] == ["telemetry.degraded"]


async def test_a_langgraph_that_cannot_be_observed_at_all_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_runner, "arun_with_retry", _passed_on(_runner.arun_with_retry))  # type: ignore[attr-defined]
    monkeypatch.setattr(wrapping, "_Proc", lambda proc, policies: proc)
    with pytest.raises(SeamMismatch, match=r"arun_with_retry.*with wrapped nodes"):
        await observe()

    assert seam._installed == []


def _passed_on(original: Any) -> Any:
    async def changed(*args: Any, **kwargs: Any) -> Any:
        return await original(*args, **kwargs)

    return changed
