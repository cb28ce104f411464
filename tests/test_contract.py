"""Which class an error falls into, whichever library raised it and however it behaves."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import sqlite3
import urllib.error
from email.message import Message
from typing import Any

import httpx
import httpx2
import openai
import pydantic
import pytest
import requests
import tenacity
from langchain_core.exceptions import OutputParserException
from langchain_core.tools import ToolException
from langgraph.errors import (
    GraphInterrupt,
    GraphRecursionError,
    InvalidUpdateError,
    NodeTimeoutError,
)

from telemetry.contract import ERROR_CLASSES, classify, error_type

REQUEST = httpx.Request("GET", "http://service.test")
REQUEST2 = httpx2.Request("GET", "http://service.test")


def raised(expected: type[Exception], action: Any) -> Exception:
    with pytest.raises(expected) as info:
        action()
    return info.value


def with_attributes(**attributes: object) -> Exception:
    exc = Exception("from some client")
    vars(exc).update(attributes)
    return exc


def httpx_status(status: int) -> httpx.HTTPStatusError:
    response = httpx.Response(status, request=REQUEST)
    return httpx.HTTPStatusError("status", request=REQUEST, response=response)


def openai_status(cls: type[openai.APIStatusError], status: int) -> openai.APIStatusError:
    response = httpx2.Response(status, request=REQUEST2)
    return cls("status", response=response, body=None)


def caused(cause: BaseException, depth: int = 1) -> Exception:
    error: BaseException = cause
    for _ in range(depth):
        wrapper = RuntimeError("wrapped")
        wrapper.__cause__ = error
        error = wrapper
    assert isinstance(error, Exception)
    return error


def retry_error(outcome: BaseException | None) -> tenacity.RetryError:
    future = tenacity.Future(1)
    if outcome is None:
        future.set_result(None)
    else:
        future.set_exception(outcome)
    return tenacity.RetryError(future)


class Model(pydantic.BaseModel):
    x: int


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        pytest.param(None, "other", id="nothing"),
        pytest.param(TimeoutError(), "timeout", id="builtin timeout"),
        pytest.param(
            NodeTimeoutError("n", 1.0, kind="run", run_timeout=0.5), "timeout", id="node timeout"
        ),
        pytest.param(httpx.ReadTimeout("slow"), "timeout", id="httpx read timeout"),
        pytest.param(httpx.PoolTimeout("slow"), "timeout", id="httpx pool timeout"),
        pytest.param(httpx2.ConnectTimeout("slow"), "timeout", id="httpx2 timeout"),
        pytest.param(requests.ConnectTimeout(), "timeout", id="requests connect timeout"),
        pytest.param(requests.ReadTimeout(), "timeout", id="requests read timeout"),
        pytest.param(openai.APITimeoutError(REQUEST2), "timeout", id="openai timeout"),
        pytest.param(ConnectionResetError(), "connection", id="reset"),
        pytest.param(BrokenPipeError(), "connection", id="broken pipe"),
        pytest.param(socket.gaierror(), "connection", id="name resolution"),
        pytest.param(OSError(errno.ENETUNREACH, "no net"), "connection", id="no network"),
        pytest.param(urllib.error.URLError("gone"), "connection", id="urllib"),
        pytest.param(httpx.ConnectError("no"), "connection", id="httpx connect"),
        pytest.param(httpx.RemoteProtocolError("no"), "connection", id="httpx protocol"),
        pytest.param(httpx.LocalProtocolError("no"), "other", id="httpx own mistake"),
        pytest.param(httpx2.ReadError("no"), "connection", id="httpx2 read"),
        pytest.param(requests.ConnectionError(), "connection", id="requests connection"),
        pytest.param(
            openai.APIConnectionError(request=REQUEST2), "connection", id="openai connection"
        ),
        pytest.param(httpx_status(429), "rate_limited", id="httpx 429"),
        pytest.param(httpx_status(401), "auth", id="httpx 401"),
        pytest.param(httpx_status(403), "auth", id="httpx 403"),
        pytest.param(httpx_status(408), "timeout", id="httpx 408"),
        pytest.param(httpx_status(404), "upstream_4xx", id="httpx 404"),
        pytest.param(httpx_status(500), "upstream_5xx", id="httpx 500"),
        pytest.param(httpx_status(504), "upstream_5xx", id="httpx 504"),
        pytest.param(openai_status(openai.RateLimitError, 429), "rate_limited", id="openai 429"),
        pytest.param(openai_status(openai.AuthenticationError, 401), "auth", id="openai 401"),
        pytest.param(openai_status(openai.NotFoundError, 404), "upstream_4xx", id="openai 404"),
        pytest.param(
            openai_status(openai.InternalServerError, 529), "upstream_5xx", id="openai 529"
        ),
        pytest.param(
            urllib.error.HTTPError("http://s.test", 503, "busy", Message(), None),
            "upstream_5xx",
            id="urllib 503",
        ),
        pytest.param(with_attributes(status=502), "upstream_5xx", id="status"),
        pytest.param(with_attributes(code=429), "rate_limited", id="code"),
        pytest.param(with_attributes(code="429"), "other", id="code that is no number"),
        pytest.param(with_attributes(status_code=200), "other", id="status of no error"),
        pytest.param(SystemExit(2), "other", id="exit code"),
        pytest.param(
            raised(pydantic.ValidationError, lambda: Model(x="no")), "validation", id="pydantic"
        ),
        pytest.param(
            raised(json.JSONDecodeError, lambda: json.loads("{")), "validation", id="json"
        ),
        pytest.param(InvalidUpdateError(), "validation", id="invalid update"),
        pytest.param(OutputParserException("no"), "validation", id="output parser"),
        pytest.param(ValueError(), "other", id="plain value error"),
        pytest.param(GraphRecursionError(), "recursion_limit", id="recursion limit"),
        pytest.param(RecursionError(), "other", id="python's recursion"),
        pytest.param(ToolException(), "tool_error", id="tool"),
        pytest.param(sqlite3.OperationalError("locked"), "storage", id="sqlite"),
        pytest.param(OSError(errno.ENOSPC, "full"), "storage", id="disk full"),
        pytest.param(FileNotFoundError(), "other", id="no such file"),
        pytest.param(retry_error(TimeoutError()), "timeout", id="retry error"),
        pytest.param(retry_error(None), "other", id="retry error of a result"),
        pytest.param(tenacity.RetryError(tenacity.Future(1)), "other", id="retry error undone"),
        pytest.param(caused(TimeoutError()), "timeout", id="cause"),
        pytest.param(caused(TimeoutError(), 2), "timeout", id="cause of a cause"),
        pytest.param(caused(TimeoutError(), 3), "other", id="cause too deep"),
        pytest.param(retry_error(caused(TimeoutError())), "timeout", id="cause in a retry error"),
        pytest.param(GraphInterrupt(), "other", id="interrupt"),
        pytest.param(asyncio.CancelledError(), "other", id="cancelled"),
    ],
)
def test_an_error_has_a_class(exc: BaseException | None, expected: str) -> None:
    assert classify(exc) == expected
    assert expected in ERROR_CLASSES


def test_a_subclass_has_the_class_of_its_base() -> None:
    class Slow(httpx.ReadTimeout):
        pass

    assert classify(Slow("slow")) == "timeout"


def test_the_type_counts_when_a_property_fails() -> None:
    class Hostile(TimeoutError):
        @property
        def status_code(self) -> int:
            raise RuntimeError("no")

        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    assert classify(Hostile()) == "timeout"


class Meta(type):
    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no")


class Evil:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no")


class Endless(Exception):
    @property
    def last_attempt(self) -> Any:
        return self

    def exception(self, timeout: float) -> Exception:
        return self


@pytest.mark.parametrize(
    "exc",
    [
        pytest.param(Meta("Odd", (Exception,), {})(), id="class"),
        pytest.param(with_attributes(status_code=Evil()), id="value"),
        pytest.param(with_attributes(last_attempt=7), id="not an attempt"),
        pytest.param(Endless(), id="endless"),
    ],
)
def test_no_exception_makes_it_raise(exc: BaseException) -> None:
    assert classify(exc) == "other"


def test_the_type_of_an_error_is_its_class_name() -> None:
    assert error_type(httpx.ReadTimeout("slow")) == "ReadTimeout"
