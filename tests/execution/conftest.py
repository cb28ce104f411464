"""Every test here has the seams installed, and leaves LangGraph as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import telemetry.langchain
import telemetry.langgraph
import telemetry.tenacity


@pytest.fixture(autouse=True)
def observed() -> Iterator[None]:
    telemetry.langgraph.install()
    telemetry.tenacity.install()
    telemetry.langchain.install()
    yield
    telemetry.langchain.uninstall()
    telemetry.tenacity.uninstall()
    telemetry.langgraph.uninstall()
