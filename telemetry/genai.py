"""Spans and numbers of model calls and tool calls, never their content.

A call is seen only inside of a run. Its span hangs below what is current, an attempt as a rule, and
is current in its body. The attributes of the GenAI conventions are a dialect: without it the same
spans come with the same names.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any, Literal

from langgraph.errors import GraphBubbleUp, GraphInterrupt, ParentCommand
from opentelemetry.context import Context
from opentelemetry.trace import (
    SpanKind,
    StatusCode,
    set_span_in_context,
)

from telemetry.contract import OTHER
from telemetry.langchain import Answer
from telemetry.metrics import Metrics
from telemetry.names import Names
from telemetry.segments import Segment, current_segment
from telemetry.tenacity import was_cancelled
from telemetry.tracing import Tracing

__all__ = ["MAX_NAMES", "GenAi"]

#: Models, and tools, that have spans of their own name; a name may be the client's choice.
MAX_NAMES = 100

ToolOutcome = Literal["success", "error", "interrupted", "cancelled"]

#: Providers that the conventions spell otherwise than LangChain.
_PROVIDERS = {
    "amazon_bedrock": "aws.bedrock",
    "anthropic_bedrock": "aws.bedrock",
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "bedrock_converse": "aws.bedrock",
    "google_genai": "gcp.gemini",
    "google_vertexai": "gcp.vertex_ai",
    "ibm": "ibm.watsonx.ai",
    "mistral": "mistral_ai",
    "mistralai": "mistral_ai",
    "xai": "x_ai",
}
#: Field of an answer, `direction` of the metric, attribute of the dialect.
_USAGE = (
    ("input_tokens", "input", "gen_ai.usage.input_tokens"),
    ("output_tokens", "output", "gen_ai.usage.output_tokens"),
    ("cache_read_tokens", "cache_read", "gen_ai.usage.cache_read.input_tokens"),
    ("cache_write_tokens", "cache_write", "gen_ai.usage.cache_creation.input_tokens"),
    ("reasoning_tokens", "reasoning", "gen_ai.usage.reasoning.output_tokens"),
)


class GenAi:
    """The witness of what a run's models and tools do: see `telemetry.langchain`."""

    def __init__(
        self,
        tracing: Tracing,
        metrics: Metrics,
        *,
        semconv: Literal["genai", "none"] = "genai",
        models: Collection[str] = (),
    ) -> None:
        """`models` are those that metrics tell apart; any other is `other`."""
        self.tracing = tracing
        self.dialect = semconv == "genai"
        self.models = frozenset(models)
        self.tool_duration = metrics["tool_duration_seconds"]
        self.llm_duration = metrics["llm_duration_seconds"]
        self.llm_first_chunk = metrics["llm_first_chunk_seconds"]
        self._chat_names = Names(MAX_NAMES)
        self._tool_names = Names(MAX_NAMES)

    def chat(self, provider: str, model: str | None) -> _Chat | None:
        """A chat model is about to be called. None outside of a run."""
        segment = current_segment.get()
        return None if segment is None else _Chat(self, segment, provider, model)

    def tool(self, name: str, call_id: str | None) -> _Tool | None:
        """A tool is about to be called. None outside of a run."""
        segment = current_segment.get()
        return None if segment is None else _Tool(self, segment, name, call_id)

    def chat_name(self, model: str | None) -> str:
        """What the span of a call of this model is called."""
        return "chat" if model is None else f"chat {self._chat_names.bounded(model)}"

    def tool_name(self, tool: str) -> str:
        """What the span of a call of this tool is called."""
        return f"execute_tool {self._tool_names.bounded(tool)}"


class _Operation:
    """A span that is current in a body, from its start until it is told its end."""

    def __init__(
        self,
        genai: GenAi,
        segment: Segment,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, Any],
    ) -> None:
        self.genai = genai
        self.segment = segment
        self.span = genai.tracing.start(
            name,
            kind=kind,
            parent=segment.around(),
            attributes=attributes if genai.dialect else None,
        )
        self.context: Context = set_span_in_context(self.span)
        self.began = time.perf_counter()

    def finish(self, error: BaseException | None) -> float:
        """End the span; the seconds that it took."""
        took = time.perf_counter() - self.began
        if error is not None and _outcome(error) == "error":
            self.segment.set_error(self.span, error)
        self.span.end()
        return took


class _Chat(_Operation):
    def __init__(self, genai: GenAi, segment: Segment, provider: str, model: str | None) -> None:
        self._labels = (provider, model if model is not None and model in genai.models else OTHER)
        attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDERS.get(provider, provider),
        }
        if model is not None:
            attributes["gen_ai.request.model"] = model
        super().__init__(genai, segment, genai.chat_name(model), SpanKind.CLIENT, attributes)
        self._first_chunk_s: float | None = None

    def first_chunk(self) -> None:
        self._first_chunk_s = time.perf_counter() - self.began

    def ended(self, answer: Answer, error: BaseException | None) -> None:
        genai = self.genai
        try:
            if genai.dialect:
                self.span.set_attributes(self._attributes(answer))
        finally:
            took = self.finish(error)
        if answer.cached:
            return
        outcome = "success" if error is None else _outcome(error)
        if self._first_chunk_s is not None:
            genai.llm_first_chunk.observe(self._first_chunk_s, *self._labels)
        if outcome in ("success", "error"):
            genai.llm_duration.observe(took, *self._labels)
        self.segment.spend(
            {
                (*self._labels, direction): tokens
                for field, direction, _ in _USAGE
                if (tokens := getattr(answer, field))
            },
            kept=outcome == "success" or isinstance(error, GeneratorExit),
        )

    def _attributes(self, answer: Answer) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        if answer.model is not None:
            attributes["gen_ai.response.model"] = answer.model
        if answer.finish_reasons:
            attributes["gen_ai.response.finish_reasons"] = answer.finish_reasons
        if self._first_chunk_s is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = round(self._first_chunk_s, 6)
        if not answer.cached:
            for field, _, attribute in _USAGE:
                if (tokens := getattr(answer, field)) is not None:
                    attributes[attribute] = tokens
        return attributes


class _Tool(_Operation):
    def __init__(self, genai: GenAi, segment: Segment, name: str, call_id: str | None) -> None:
        self._name = name
        attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name}
        if call_id is not None:
            attributes["gen_ai.tool.call.id"] = call_id
        super().__init__(genai, segment, genai.tool_name(name), SpanKind.INTERNAL, attributes)

    def ended(self, error: BaseException | None, *, failed: bool = False) -> None:
        outcome: ToolOutcome = "error" if failed else "success"
        if error is not None:
            outcome = _outcome(error)
        elif failed:  # its exception has become a message; which it was is not told
            self.span.set_attributes({"error.type": "_OTHER", "sereno.error.class": "tool_error"})
            self.span.set_status(StatusCode.ERROR, "the tool answered with an error")
        took = self.finish(error)
        self.genai.tool_duration.observe(took, self.segment.graph, self._name, outcome)


def _outcome(error: BaseException) -> ToolOutcome:
    if isinstance(error, ParentCommand):
        return "success"
    if isinstance(error, GraphInterrupt):
        return "interrupted"
    if isinstance(error, GraphBubbleUp | GeneratorExit) or was_cancelled(error):
        return "cancelled"
    return "error"
