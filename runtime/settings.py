"""Every setting, read once from `SERENO_*`, frozen and passed in."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.errors import BadSetting

__all__ = ["Durability", "Settings", "load"]

Durability = Literal["sync", "async", "exit"]
TraceTrust = Literal["parent", "link", "ignore"]
Semconv = Literal["genai", "none"]
LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value),
]


class Settings(BaseSettings):
    """What a server can be told. Each field is `SERENO_<NAME>`; the command line wins."""

    model_config = SettingsConfigDict(env_prefix="SERENO_", frozen=True, extra="ignore")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8009, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    engine: str = Field("sqlite:///./sereno.db", description="Where runs live: a URL.")
    insecure: bool = Field(False, description="Allow a non-loopback address without API keys.")
    lenient: bool = Field(False, description="Serve the graphs that load when others do not.")
    wait_lock: bool = Field(False, description="Wait for the store's lock instead of failing.")
    default_graph: str | None = Field(None, description="Graph of the seed profile.")
    slots: int = Field(64, ge=1, description="Runs that execute at the same time.")
    queue_max: int = Field(10_000, ge=1, description="Runs that may wait; more get 503.")
    executor_threads: int = Field(64, ge=1, description="Threads for sync nodes.")
    durability: Durability = Field("sync", description="LangGraph's durability of runs.")
    recursion_limit: int = Field(100, ge=1, description="Supersteps of a run unless it says.")
    recursion_limit_max: int = Field(1000, ge=1, description="The most that a run may ask for.")
    lease_s: float = Field(30.0, gt=0, description="Seconds until a silent worker's lease expires.")
    lease_heartbeat_s: float = Field(10.0, gt=0, description="Seconds between lease renewals.")
    drain_s: float = Field(25.0, ge=0, description="Seconds that a shutdown waits for supersteps.")
    cancel_grace_s: float = Field(5.0, ge=0, description="Seconds that a cancelled node may take.")
    graph_wait_s: float = Field(
        300.0, ge=0, description="Seconds that a run waits for a graph that is not served."
    )
    heartbeat_s: float = Field(10.0, ge=0, description="Seconds between heartbeat lines; 0 is off.")
    stream_max_s: float = Field(0.0, ge=0, description="Longest a stream stays open; 0 is forever.")
    write_timeout_s: float = Field(
        30.0, gt=0, description="Seconds that a client may take to accept one chunk."
    )
    token_ms: float = Field(30.0, ge=0, description="Milliseconds over which tokens are joined.")
    line_max: int = Field(1024 * 1024, ge=1024, description="Bytes of a line.")
    body_max: int = Field(1024 * 1024, ge=1024, description="Bytes of a request body.")
    run_max_events: int = Field(100_000, ge=10, description="Lines of a run.")
    run_max_log_bytes: int = Field(256 * 1024 * 1024, ge=1024, description="Bytes of a run's log.")
    run_max_unwritten: int = Field(10_000, ge=1, description="Lines of a run not yet committed.")
    expose_errors: bool = Field(False, description="Send exception messages to clients.")
    serde_allow: str = Field("", description="module:Class,… that checkpoints may hold.")
    tenacity_guard: bool = Field(True, description="Let interrupts pass through a default @retry.")
    admin_host: str = Field("127.0.0.1", description="Address of the admin listener.")
    admin_port: int = Field(
        9009, ge=0, le=65535, description="Port of the admin listener; 0 takes a free one."
    )
    trace_trust: TraceTrust = Field(
        "link", description="What a client's traceparent is: parent, link or ignore."
    )
    semconv: Semconv = Field("genai", description="Dialect of chat and tool spans: genai or none.")
    instrument_httpx: bool = Field(True, description="Make outbound httpx requests spans.")
    otlp_logs: bool = Field(False, description="Export log records by OTLP as well.")
    exception_messages: bool = Field(
        True, description="Show messages of exceptions in logs and spans."
    )
    metrics_max_series: int = Field(
        2_000, ge=1, description="Label combinations of one metric; more fold into one."
    )
    metrics_models: str = Field("", description="Model names that metrics tell apart: a,b,…")
    recorder_spans: int = Field(
        20_000, ge=1, description="Finished spans kept for /v1/runs/{id}/trace."
    )
    loop_stall_s: float = Field(
        0.25, gt=0, description="Seconds of a blocked event loop that are reported."
    )
    run_heartbeat_s: float = Field(
        15.0, gt=0, description="Seconds between log records of a run that goes on."
    )
    trace_url: str = Field("", description="Link to a trace, with {trace_id}, for the page.")
    log_level: LogLevel = Field("INFO", description="DEBUG, INFO, WARNING, ERROR or CRITICAL.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def load(**overrides: object) -> Settings:
    """Read the environment; keyword arguments that are not None win. Raises BadSetting."""
    # Before langgraph is imported: checkpoints hold declared types only.
    os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
    try:
        return Settings(**{k: v for k, v in overrides.items() if v is not None})  # type: ignore[arg-type]
    except ValidationError as exc:
        first = exc.errors()[0]
        name = "SERENO_" + "_".join(str(part) for part in first["loc"]).upper()
        raise BadSetting(f"{name}: {first['msg']} (got {first.get('input')!r})") from exc
