"""What telemetry promises by name, and how an exception becomes one of a closed set of classes."""

from __future__ import annotations

import errno
from typing import Any, Literal, get_args

__all__ = ["ERROR_CLASSES", "ErrorClass", "classify", "error_text", "error_type"]

#: `error_class`, on metrics, spans, logs and lines: closed, so that it can be a metric's label.
ErrorClass = Literal[
    "timeout",
    "connection",
    "rate_limited",
    "upstream_5xx",
    "upstream_4xx",
    "validation",
    "auth",
    "recursion_limit",
    "tool_error",
    "storage",
    "max_attempts",
    "worker_lost",
    "other",
]

ERROR_CLASSES: tuple[ErrorClass, ...] = get_args(ErrorClass)

#: Top-level package and class name: the libraries themselves need not be installed. The nearest
#: class of an exception's own order of inheritance decides.
_CLASSES: dict[ErrorClass, tuple[str, ...]] = {
    "timeout": (
        "builtins.TimeoutError",  # asyncio's, concurrent.futures' and socket's too
        "langgraph.NodeTimeoutError",
        "httpx.TimeoutException",
        "httpx2.TimeoutException",
        "httpcore.TimeoutException",
        "httpcore2.TimeoutException",
        "requests.ConnectTimeout",  # would be a ConnectionError first
        "requests.Timeout",
        "urllib3.TimeoutError",
        "openai.APITimeoutError",
        "anthropic.APITimeoutError",
    ),
    "connection": (
        "builtins.ConnectionError",
        "socket.gaierror",
        "ssl.SSLError",
        "http.IncompleteRead",
        "urllib.URLError",
        "httpx.NetworkError",
        "httpx.ProxyError",
        "httpx.RemoteProtocolError",
        "httpx2.NetworkError",
        "httpx2.ProxyError",
        "httpx2.RemoteProtocolError",
        "httpcore.NetworkError",
        "httpcore.ProxyError",
        "httpcore.RemoteProtocolError",
        "httpcore2.NetworkError",
        "httpcore2.ProxyError",
        "httpcore2.RemoteProtocolError",
        "requests.ConnectionError",
        "requests.ChunkedEncodingError",
        "urllib3.NewConnectionError",  # would be a TimeoutError first
        "urllib3.ProtocolError",
        "urllib3.ProxyError",
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "openai.APIConnectionError",
        "anthropic.APIConnectionError",
    ),
    "validation": (
        "pydantic.ValidationError",
        "pydantic_core.ValidationError",
        "json.JSONDecodeError",
        "langgraph.InvalidUpdateError",
        "langgraph.EmptyInputError",
        "langchain_core.OutputParserException",
        "openai.APIResponseValidationError",
        "anthropic.APIResponseValidationError",
    ),
    "recursion_limit": ("langgraph.GraphRecursionError",),
    "tool_error": ("langchain_core.ToolException",),
    "storage": ("sqlite3.Error",),
}
_BY_NAME = {name: error_class for error_class, names in _CLASSES.items() for name in names}

_BY_ERRNO: dict[int, ErrorClass] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO), "storage"),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN), "connection"),
}

#: How far below an error of no class of its own its cause is looked for.
_DEPTH = 2


def classify(exc: BaseException | None) -> ErrorClass:
    """The class of an error. Never raises, whatever the exception's properties do.

    An HTTP status says more than a type, and a type more than the error that caused it. A plain
    ValueError is `other`: it may be anybody's.
    """
    try:
        return _classify(exc, _DEPTH)
    except Exception:
        return "other"


def error_type(exc: BaseException) -> str:
    """`error.type`: the exception's class name. Never a metric label."""
    return type(exc).__name__


def error_text(exc: BaseException, limit: int = 2_000) -> str:
    """An exception's message. Never raises, whatever its `__str__` does."""
    try:
        return str.__str__(str(exc))[:limit]
    except Exception:
        return f"<{type(exc).__name__} without a message>"


def _classify(exc: BaseException | None, depth: int) -> ErrorClass:
    if exc is None:
        return "other"
    found = _by_status(exc) or _by_type(exc)
    if found is None and depth:
        last = _get(exc, "last_attempt")  # tenacity's RetryError
        inner = last.exception(timeout=0) if last is not None else exc.__cause__
        found = _classify(inner, depth - 1)
    return found or "other"


def _by_status(exc: BaseException) -> ErrorClass | None:
    for owner in (exc, _get(exc, "response")):
        for name in ("status_code", "status", "code"):
            status = _get(owner, name)
            if isinstance(status, int) and 400 <= status <= 599:
                return _of_status(status)
    return None


def _of_status(status: int) -> ErrorClass:
    if status == 429:
        return "rate_limited"
    if status in (401, 403):
        return "auth"
    if status == 408:
        return "timeout"
    return "upstream_5xx" if status >= 500 else "upstream_4xx"


def _by_type(exc: BaseException) -> ErrorClass | None:
    for cls in type(exc).__mro__:
        package = cls.__module__.partition(".")[0]
        if found := _BY_NAME.get(f"{package}.{cls.__name__}"):
            return found
    return _BY_ERRNO.get(exc.errno or 0) if isinstance(exc, OSError) else None


def _get(owner: object, name: str) -> Any:
    """An attribute, or None when there is none or reading it fails."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None
