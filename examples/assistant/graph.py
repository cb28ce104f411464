"""A chat assistant with tools: it asks a person before it does anything that cannot be undone."""

import asyncio
import functools
import os
from typing import Annotated, Any, Literal

import langchain_openai  # noqa: F401  init_chat_model would import it, slowly, in the first run
import standin
from langchain.chat_models import init_chat_model
from langchain_core.exceptions import (
    ModelAPIError,
    ModelConnectionError,
    ModelRateLimitError,
    ModelTimeoutError,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, SystemMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import ToolException
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pace import PACE
from tenacity import RetryCallState, retry, retry_if_exception_type, stop_after_attempt
from tools import DANGEROUS, TOOLS
from typing_extensions import TypedDict

RULES = SystemMessage(
    "Eres el asistente de una tienda. Contesta en una o dos frases, en el idioma del cliente. "
    "Usa las herramientas; no inventes pedidos, precios ni plazos."
)
YES = {"sí", "si", "s", "yes", "y", "ok", "vale"}
NO = {"no", "n"}
#: The longest that a 429 may make us wait.
PATIENCE_S = 60.0


class Said(TypedDict):
    role: Literal["user"]
    content: str


class Request(TypedDict):
    messages: list[Said]


class Chat(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


@functools.cache
def model() -> Runnable[Any, AIMessage]:
    """The model that the environment names, or else the stand-in, which starts to listen then."""
    key, url = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    if key or url:
        name = os.environ.get("OPENAI_MODEL") or "gpt-4.1-mini"
        where: dict[str, Any] = {"base_url": url or None, "api_key": key or "none"}
    else:
        name = "stand-in"
        where = {"base_url": standin.url(), "http_async_client": standin.client()}
        where["api_key"] = "none"
    chat: BaseChatModel = init_chat_model(
        name,
        model_provider="openai",
        use_responses_api=False,  # chat completions are what every compatible server speaks
        stream_usage=True,
        timeout=60,
        max_retries=0,  # the client's own retries would be seen by nobody
        **where,
    )
    return chat.bind_tools(TOOLS)


def as_told(state: RetryCallState) -> float:
    """A 429 says when to come back."""
    error = state.outcome.exception() if state.outcome else None
    response = getattr(error, "response", None)
    try:
        asked = float(response.headers["Retry-After"]) if response is not None else None
    except (KeyError, ValueError):
        asked = None
    return PACE * 2**state.attempt_number if asked is None else min(max(asked, 0.0), PATIENCE_S)


@retry(
    retry=retry_if_exception_type(ModelRateLimitError),
    wait=as_told,
    stop=stop_after_attempt(3),
    reraise=True,
)
async def reply_to(messages: list[AnyMessage]) -> AIMessage:
    # In a thread, because the first time it makes a client and its certificates.
    chat = await asyncio.to_thread(model)
    return await chat.ainvoke([RULES, *messages])


async def ask(state: Chat) -> Chat:
    """What has failed in other ways than by a 429 is left to the node's retry policy."""
    return {"messages": [await reply_to(state["messages"])]}


def what_next(state: Chat) -> list[Send] | str:
    calls = calls_in(state)
    if any(call["name"] in DANGEROUS for call in calls):
        return "approve"
    return [Send("tools", [call]) for call in calls] or END


def approve(state: Chat) -> Command[Literal["tools", "ask", "approve"]]:
    """Waits for a person: yes lets all calls pass, no only those that do no harm."""
    calls = calls_in(state)
    risky = [call for call in calls if call["name"] in DANGEROUS]
    answer = interrupt(
        {
            "question": "¿Lo hago?",
            "calls": [{"name": call["name"], "args": call["args"]} for call in risky],
            "answers": ['{"approve": true}', '{"approve": false}', "sí", "no"],
        }
    )
    match answer:
        case {"approve": bool(agreed)} | bool(agreed):
            pass
        case str(text) if text.strip().lower() in YES | NO:
            agreed = text.strip().lower() in YES
        case _:
            return Command(goto="approve")
    allowed = [call for call in calls if agreed or call not in risky]
    refused = [
        ToolMessage("Una persona ha dicho que no.", tool_call_id=call["id"], name=call["name"])
        for call in calls
        if call not in allowed
    ]
    return Command(
        goto=[Send("tools", [call]) for call in allowed] or "ask", update={"messages": refused}
    )


def sorry(error: ToolException) -> str:
    """A tool that cannot do what it is asked for tells the model so; other errors end the run."""
    return str(error)


def calls_in(state: Chat) -> list[Any]:
    last = state["messages"][-1]
    return last.tool_calls if isinstance(last, AIMessage) else []


builder = StateGraph(Chat, input_schema=Request)
builder.add_node(
    "ask",
    ask,
    retry_policy=RetryPolicy(
        initial_interval=0.5 * PACE,
        max_attempts=3,
        jitter=False,
        retry_on=(ModelAPIError, ModelConnectionError, ModelTimeoutError),
    ),
)
builder.add_node("approve", approve)
builder.add_node("tools", ToolNode(TOOLS, handle_tool_errors=sorry))
builder.add_edge(START, "ask")
builder.add_conditional_edges("ask", what_next, ["tools", "approve", END])
builder.add_edge("tools", "ask")

#: It needs a checkpointer to wait for an answer: a server gives its own.
graph = builder.compile()
