"""Reads OpenTelemetry's own variables as its specification wants them read.

What cannot be read is as good as unset, and a record says so. Parts of the SDK raise instead, some
of them while they are imported: so this package takes it out of the environment before that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from importlib.metadata import entry_points
from typing import NamedTuple
from urllib.parse import urlsplit

import structlog

__all__ = ["Ignored", "number", "take_out"]

_MOST = 2**31 - 1

_log = structlog.get_logger("telemetry")


class Ignored(NamedTuple):
    """A variable that is as good as unset, and what it may be."""

    variable: str
    value: str
    remedy: str

    def tell(self) -> None:
        """Say so in the log."""
        _log.warning("Variable ignored", **self._asdict())


def take_out(environ: MutableMapping[str, str]) -> Iterator[Ignored]:
    """Take out of an environment what nobody can read, and tell what that was."""
    for name, (readable, remedy) in _VARIABLES.items():
        value = environ.get(name)
        if value is None or readable(value.strip()):
            continue
        del environ[name]
        if value.strip():  # else it is unset, which not all of the SDK knows
            yield Ignored(name, value if "@" not in value else "(not shown)", remedy)
    for name, group in _PLUGINS.items():
        if name not in environ:
            continue
        value = environ[name].strip()
        wanted = [one.strip() for one in value.split(",")]
        there = {plugin.name for plugin in entry_points(group=group)}
        if name == _PROPAGATORS:
            there.add("none")
        known = [one for one in wanted if one in there]
        if known == wanted:
            continue
        if any(one and one not in there for one in wanted):
            yield Ignored(
                name, value, f"one of those that are installed: {', '.join(sorted(there))}"
            )
        if known:
            environ[name] = ",".join(known)
        else:
            del environ[name]


def number(name: str, default: int) -> int:
    """A positive number from the environment."""
    given = os.environ.get(name, "").strip()
    if not given:
        return default
    if _count(given) and int(given) > 0:
        return int(given)
    Ignored(name, given, f"a positive number; it is {default} now").tell()
    return default


def _count(value: str) -> bool:
    # So many digits first: Python refuses to convert thousands of them.
    return value.isdecimal() and len(value) <= 10 and int(value) <= _MOST


def _seconds(value: str) -> bool:
    try:
        return 0 < float(value) <= _MOST
    except ValueError:
        return False


def _url(value: str) -> bool:
    try:
        url = urlsplit(value)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def _http(value: str) -> bool:
    return value == "http/protobuf"


_SIGNALS = ("", "TRACES_", "LOGS_")
_VARIABLES: dict[str, tuple[Callable[[str], bool], str]] = {
    **{
        f"OTEL_{what}_LIMIT": (_count, "a number, 0 or more")
        for what in (
            "ATTRIBUTE_COUNT",
            "ATTRIBUTE_VALUE_LENGTH",
            "EVENT_ATTRIBUTE_COUNT",
            "LINK_ATTRIBUTE_COUNT",
            "LOGRECORD_ATTRIBUTE_COUNT",
            "LOGRECORD_ATTRIBUTE_VALUE_LENGTH",
            "SPAN_ATTRIBUTE_COUNT",
            "SPAN_ATTRIBUTE_VALUE_LENGTH",
            "SPAN_EVENT_COUNT",
            "SPAN_LINK_COUNT",
        )
    },
    **{
        f"OTEL_EXPORTER_OTLP_{signal}{what}": said
        for signal in _SIGNALS
        for what, said in {
            "ENDPOINT": (_url, "a URL, such as http://localhost:4318"),
            "PROTOCOL": (_http, "http/protobuf, to which collectors listen at port 4318"),
            "TIMEOUT": (_seconds, "a number of seconds above 0"),
        }.items()
    },
}
_PROPAGATORS = "OTEL_PROPAGATORS"
#: Names of what is installed, by where packages say that they have it.
_PLUGINS = {
    _PROPAGATORS: "opentelemetry_propagator",
    "OTEL_PYTHON_METER_PROVIDER": "opentelemetry_meter_provider",
    "OTEL_PYTHON_TRACER_PROVIDER": "opentelemetry_tracer_provider",
    **{
        f"OTEL_PYTHON_EXPORTER_OTLP_HTTP_{signal}CREDENTIAL_PROVIDER": (
            "opentelemetry_otlp_credential_provider"
        )
        for signal in _SIGNALS
    },
}
