"""`@resilient`: the standard retry for a function that calls something outside.

Three attempts, four to ten seconds apart, for faults that pass by themselves; the last error is
raised as it is. It is tenacity underneath: `.retry`, `.retry_with(…)` and `.statistics` are there.
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, ParamSpec, TypeVar, cast, overload

import tenacity
from langgraph.errors import GraphBubbleUp
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from tenacity import RetryCallState

from runtime.errors import BadSetting
from telemetry.contract import classify

__all__ = ["RETRY_AFTER_MAX_S", "TRANSIENT", "resilient"]

P = ParamSpec("P")
R = TypeVar("R")

#: The classes of error that are worth a second try.
TRANSIENT = frozenset({"timeout", "connection", "rate_limited", "upstream_5xx"})

#: A `Retry-After` is obeyed up to here, or up to `max_s` if that is longer. The server knows better
#: than our exponent, and its windows are a minute long; a call that sleeps for longer holds its
#: node, its run and its worker's slot: there it is better to fail and leave it to the run.
RETRY_AFTER_MAX_S = 60.0


@overload
def resilient(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def resilient(
    *,
    attempts: int | None = None,
    multiplier: float | None = None,
    min_s: float | None = None,
    max_s: float | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def resilient(
    function: Callable[P, R] | None = None,
    /,
    *,
    attempts: int | None = None,
    multiplier: float | None = None,
    min_s: float | None = None,
    max_s: float | None = None,
) -> Callable[P, R] | Callable[[Callable[P, R]], Callable[P, R]]:
    """Retry a sync or async function or method when it fails on something that may pass.

    A number that is not given is read from `SERENO_RETRY_ATTEMPTS`, `_MULTIPLIER`, `_MIN_S` and
    `_MAX_S` at the function's first call, which raises BadSetting when one cannot be used.
    """
    given = {"attempts": attempts, "multiplier": multiplier, "min_s": min_s, "max_s": max_s}

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        policy = _Policy({name: value for name, value in given.items() if value is not None})
        decorated = tenacity.retry(
            before=policy.before,
            retry=policy.retry,
            stop=policy.stop,
            wait=policy.wait,
            reraise=True,
        )(function)
        return cast("Callable[P, R]", decorated)

    return decorate if function is None else decorate(function)


class _Numbers(BaseSettings):
    """How often and how far apart: an argument wins over the environment."""

    model_config = SettingsConfigDict(
        env_prefix="SERENO_RETRY_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    attempts: int = Field(3, ge=1)
    multiplier: float = Field(1.0, ge=0, allow_inf_nan=False)
    min_s: float = Field(4.0, ge=0, allow_inf_nan=False)
    #: Wins over `min_s`, so that one number is enough to wait less.
    max_s: float = Field(10.0, ge=0, allow_inf_nan=False)


class _Policy:
    """What tenacity asks of one decorated function."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    @cached_property
    def numbers(self) -> _Numbers:
        try:
            return _Numbers(**self._given)
        except ValidationError as exc:
            first = exc.errors()[0]
            field = str(first["loc"][0])
            name = f"SERENO_RETRY_{field.upper()}"
            where, remedy = name, f"unset {name}"
            if field in self._given:
                where, remedy = f"resilient({field}=…)", "leave it out"
            default = _Numbers.model_fields[field].default
            raise BadSetting(
                f"{where}: {first['msg']} (got {first['input']!r}); {remedy} for {default}"
            ) from exc

    @cached_property
    def _exponential(self) -> tenacity.wait_exponential:
        n = self.numbers
        return tenacity.wait_exponential(n.multiplier, max=n.max_s, min=min(n.min_s, n.max_s))

    def before(self, state: RetryCallState) -> None:
        """A bad number is told at the first call, not at the first failure."""
        _ = self.numbers

    def retry(self, state: RetryCallState) -> bool:
        exc = _error(state)
        return (
            isinstance(exc, Exception)
            and not isinstance(exc, GraphBubbleUp)
            and classify(exc) in TRANSIENT
        )

    def stop(self, state: RetryCallState) -> bool:
        return state.attempt_number >= self.numbers.attempts

    def wait(self, state: RetryCallState) -> float:
        asked = min(_retry_after(_error(state)), max(RETRY_AFTER_MAX_S, self.numbers.max_s))
        return max(self._exponential(state), asked)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _retry_after(exc: BaseException | None) -> float:
    """Seconds that the server asked for, in the error's response or that of its cause; else 0."""
    for _ in range(3):
        if exc is None:
            break
        try:
            owner = exc if hasattr(exc, "headers") else exc.response  # type: ignore[attr-defined]
            if value := owner.headers.get("retry-after") or owner.headers.get("Retry-After"):
                return _seconds(str(value).strip())
        except Exception:  # no response, or none that we can read: as if it asked for nothing
            pass
        exc = exc.__cause__
    return 0.0


def _seconds(value: str) -> float:
    """Both forms of RFC 9110: a number of seconds, or a date."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = email.utils.mktime_tz(_date(value)) - time.time()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _date(value: str) -> tuple[Any, ...]:
    parsed = email.utils.parsedate_tz(value)
    if parsed is None:
        raise ValueError(value)
    return parsed
