"""What `@resilient` retries, how often, and how long it waits."""

from __future__ import annotations

import asyncio
import email.utils
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import tenacity
from langgraph.errors import GraphInterrupt

import telemetry.tenacity
from runtime.errors import BadSetting
from runtime.resilience import RETRY_AFTER_MAX_S, resilient
from telemetry.langgraph import listen
from telemetry.observations import CallAttemptEnded, Observation


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATTEMPTS", "MULTIPLIER", "MIN_S", "MAX_S"):
        monkeypatch.delenv(f"SERENO_RETRY_{name}", raising=False)


def waits(function: Any) -> list[float]:
    """The sleeps of a call that fails for good; none of them is slept."""
    slept: list[float] = []
    with pytest.raises((TimeoutError, RuntimeError, httpx.HTTPStatusError, GraphInterrupt)):
        function.retry_with(sleep=slept.append)()
    return slept


def failing(exc: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise exc

    return call


def status(code: int, **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://service.test")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx.Response(code, headers=named, request=request)
    return httpx.HTTPStatusError("status", request=request, response=response)


class TestTheStandard:
    def test_it_calls_three_times_with_four_seconds_between(self) -> None:
        assert waits(resilient(failing(TimeoutError()))) == [4, 4]

    def test_the_wait_doubles_between_four_and_ten_seconds(self) -> None:
        assert waits(resilient(attempts=7)(failing(TimeoutError()))) == [4, 4, 4, 8, 10, 10]

    def test_the_last_error_is_raised_as_it_is(self) -> None:
        error = ConnectionResetError("gone")
        with pytest.raises(ConnectionResetError) as info:
            resilient(min_s=0, max_s=0)(failing(error))()

        assert info.value is error

    @pytest.mark.parametrize(
        ("error", "calls"),
        [
            pytest.param(TimeoutError(), 3, id="timeout"),
            pytest.param(httpx.ConnectError("no"), 3, id="connection"),
            pytest.param(status(429), 3, id="rate limited"),
            pytest.param(status(503), 3, id="5xx"),
            pytest.param(status(404), 1, id="4xx"),
            pytest.param(status(401), 1, id="auth"),
            pytest.param(ValueError(), 1, id="value error"),
            pytest.param(sqlite3.OperationalError(), 1, id="storage"),
            pytest.param(GraphInterrupt(), 1, id="interrupt"),
            pytest.param(asyncio.CancelledError(), 1, id="cancelled"),
            pytest.param(KeyboardInterrupt(), 1, id="keyboard"),
        ],
    )
    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_only_what_may_pass_is_retried(
        self, error: BaseException, calls: int, kind: str
    ) -> None:
        made = []

        @resilient(min_s=0, max_s=0)
        def call() -> None:
            made.append(1)
            raise error

        @resilient(min_s=0, max_s=0)
        async def acall() -> None:
            made.append(1)
            raise error

        with pytest.raises(type(error)):
            call() if kind == "sync" else await acall()

        assert len(made) == calls

    def test_an_interrupt_because_of_a_timeout_is_still_an_interrupt(self) -> None:
        error = GraphInterrupt()
        error.__cause__ = TimeoutError()

        assert waits(resilient(failing(error))) == []


class TestForms:
    def test_a_method_keeps_its_self(self) -> None:
        class Client:
            left = 2

            @resilient(min_s=0, max_s=0)
            def fetch(self, value: str, *, loud: bool = False) -> str:
                """Fetch it."""
                self.left -= 1
                if self.left:
                    raise TimeoutError
                return value.upper() if loud else value

        client = Client()

        assert client.fetch("a", loud=True) == "A"
        assert client.left == 0
        assert Client.fetch.__doc__ == "Fetch it."
        assert Client.fetch.__qualname__.endswith("Client.fetch")

    async def test_an_async_function_stays_one(self) -> None:
        left = [1]

        @resilient(min_s=0, max_s=0)
        async def fetch(value: str) -> str:
            if left:
                left.pop()
                raise TimeoutError
            return value

        assert asyncio.iscoroutinefunction(fetch)
        assert await fetch("a") == "a"

    def test_tenacity_is_underneath(self) -> None:
        function: Any = resilient(failing(TimeoutError()))

        assert isinstance(function.retry, tenacity.Retrying)
        once = function.retry_with(stop=tenacity.stop_after_attempt(1))
        with pytest.raises(TimeoutError):
            once()

    def test_the_seam_sees_the_function_under_its_own_name(self) -> None:
        seen: list[Observation] = []
        telemetry.tenacity.install()
        try:
            with listen(seen.append), pytest.raises(TimeoutError):
                resilient(min_s=0, max_s=0)(failing(TimeoutError()))()
        finally:
            telemetry.tenacity.uninstall()

        ended = [o for o in seen if isinstance(o, CallAttemptEnded)]
        assert [o.outcome for o in ended] == ["retried", "retried", "exhausted"]
        assert {o.call for o in ended} == {f"{__name__}.failing.<locals>.call"}


class TestNumbers:
    def test_the_environment_counts_when_the_function_is_first_called(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        function = resilient(failing(TimeoutError()))
        monkeypatch.setenv("SERENO_RETRY_ATTEMPTS", "4")
        monkeypatch.setenv("SERENO_RETRY_MULTIPLIER", "3")
        monkeypatch.setenv("SERENO_RETRY_MIN_S", "0.5")
        monkeypatch.setenv("SERENO_RETRY_MAX_S", "9")
        assert waits(function) == [3, 6, 9]

        monkeypatch.setenv("SERENO_RETRY_ATTEMPTS", "2")
        assert waits(function) == [3, 6, 9]

    def test_an_argument_wins_over_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SERENO_RETRY_ATTEMPTS", "5")
        monkeypatch.setenv("SERENO_RETRY_MIN_S", "5")

        assert waits(resilient(attempts=2)(failing(TimeoutError()))) == [5]

    def test_an_empty_variable_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SERENO_RETRY_ATTEMPTS", "")

        assert waits(resilient(failing(TimeoutError()))) == [4, 4]

    def test_the_longest_wait_wins_over_the_shortest(self) -> None:
        assert waits(resilient(max_s=2)(failing(TimeoutError()))) == [2, 2]

    @pytest.mark.parametrize(
        ("name", "value", "default"),
        [
            pytest.param("ATTEMPTS", "many", "3", id="no number"),
            pytest.param("ATTEMPTS", "0", "3", id="no attempt"),
            pytest.param("MULTIPLIER", "-1", "1.0", id="negative"),
            pytest.param("MIN_S", "nan", "4.0", id="nan"),
            pytest.param("MAX_S", "inf", "10.0", id="endless"),
        ],
    )
    def test_a_bad_variable_is_told_at_the_first_call(
        self, name: str, value: str, default: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called = []
        function = resilient(lambda: called.append(1))
        monkeypatch.setenv(f"SERENO_RETRY_{name}", value)

        with pytest.raises(BadSetting, match=f"^SERENO_RETRY_{name}: .*{value}") as info:
            function()
        assert str(info.value).endswith(f"unset SERENO_RETRY_{name} for {default}")
        assert called == []

        monkeypatch.delenv(f"SERENO_RETRY_{name}")
        function()
        assert called == [1]

    def test_a_bad_argument_is_told_by_its_name(self) -> None:
        with pytest.raises(BadSetting, match=r"^resilient\(attempts=…\): .*; leave it out for 3$"):
            resilient(attempts=0)(lambda: None)()


class Response:
    def __init__(self, headers: Any) -> None:
        self.headers = headers


class Busy(TimeoutError):
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def wrapped(cause: Exception) -> Exception:
    error = RuntimeError("wrapped")
    error.__cause__ = cause
    return error


class Hostile(TimeoutError):
    @property
    def response(self) -> Any:
        raise RuntimeError("no")


class TestRetryAfter:
    @pytest.mark.parametrize(
        ("error", "wait"),
        [
            pytest.param(status(429, retry_after="30"), 30, id="seconds"),
            pytest.param(status(503, retry_after="7.5"), 7.5, id="parts of seconds"),
            pytest.param(status(429, retry_after="1"), 4, id="less than our own"),
            pytest.param(status(429, retry_after="3600"), RETRY_AFTER_MAX_S, id="capped"),
            pytest.param(
                status(503, retry_after="Fri, 31 Dec 9999 23:59:59 GMT"),
                RETRY_AFTER_MAX_S,
                id="distant date",
            ),
            pytest.param(
                status(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), 4, id="date gone by"
            ),
            pytest.param(status(429, retry_after="soon"), 4, id="not readable"),
            pytest.param(status(429, retry_after="nan"), 4, id="nan"),
            pytest.param(status(429, retry_after="-5"), 4, id="negative"),
            pytest.param(status(429), 4, id="none"),
            pytest.param(wrapped(status(429, retry_after="30")), 30, id="cause"),
            pytest.param(Busy(headers={"Retry-After": "9"}), 9, id="headers of the error"),
            pytest.param(Busy(response=Response({"Retry-After": 9})), 9, id="number"),
            pytest.param(Busy(response=Response(None)), 4, id="no headers"),
            pytest.param(Hostile(), 4, id="hostile"),
        ],
    )
    def test_the_server_says_how_long(self, error: Exception, wait: float) -> None:
        assert waits(resilient(attempts=2)(failing(error))) == [wait]

    def test_it_wins_over_the_longest_wait(self) -> None:
        error = status(429, retry_after="30")

        assert waits(resilient(attempts=2, min_s=0, max_s=0)(failing(error))) == [30]

    def test_a_longer_wait_of_ours_raises_the_cap(self) -> None:
        error = status(429, retry_after="3600")

        assert waits(resilient(attempts=2, max_s=120)(failing(error))) == [120]

    def test_a_date_is_read_against_the_wall_clock(self) -> None:
        date = email.utils.formatdate(time.time() + 30, usegmt=True)
        [wait] = waits(resilient(attempts=2)(failing(status(503, retry_after=date))))

        assert 20 < wait <= 30
