"""Graphs whose nodes do what a test has written down for them, call by call, and all that can be
in a graph: retries at both layers, threads, subgraphs, fan-out, time limits, a cache, questions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import operator
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import ToolException, tool
from langgraph.cache.memory import InMemoryCache
from langgraph.config import get_config, get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, interrupt
from pydantic import BaseModel, ValidationError
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_fixed
from typing_extensions import TypedDict


class Fault(Exception):
    """What is worth another attempt."""


class Fatal(Exception):
    """What is not."""


class Script:
    """What nodes and calls do, by thread and name: a word for each call, then they pass.

    `fail` and `fatal` raise; `park` waits until it is released, or somebody stops it. It outlives
    servers, as whatever nodes call does.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[str, str], deque[str]] = {}
        self._gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def tell(self, thread_id: str, words: Mapping[str, Sequence[str]]) -> None:
        for name, sequence in words.items():
            self._left[thread_id, name] = deque(sequence)

    def forget(self, thread_id: str) -> None:
        """All calls of the thread pass from now on."""
        for key in [key for key in self._left if key[0] == thread_id]:
            del self._left[key]

    def release(self, thread_id: str) -> None:
        self._gates[thread_id].set()

    def close(self, thread_id: str) -> None:
        """Have a thread's nodes park again."""
        self._gates.pop(thread_id, None)

    async def park(self) -> None:
        await self._gates[_thread()].wait()

    def next(self, name: str) -> str:
        left = self._left.get((_thread(), name))
        return left.popleft() if left else "pass"


def _thread() -> str:
    found: str = get_config()["configurable"]["thread_id"]
    return found


script = Script()


async def play(name: str) -> None:
    word = act(name)
    if word == "park":
        await script.park()
    await asyncio.sleep(0)


def act(name: str) -> str:
    word = script.next(name)
    if word == "fail":
        raise Fault(name)
    if word == "fatal":
        raise Fatal(name)
    return word


class State(TypedDict, total=False):
    n: int
    log: Annotated[list[Any], operator.add]


def retrying(error: BaseException) -> bool:
    return not isinstance(error, Fatal)


#: Three attempts, a millisecond apart; and a back-off that only a stop ends.
SOON = RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=3, retry_on=retrying)
LATE = RetryPolicy(initial_interval=3600, max_interval=3600, jitter=False, retry_on=retrying)


def node(name: str) -> Any:
    async def body(state: State) -> State:
        get_stream_writer()({"from": name})
        await play(name)
        return {"log": [name]}

    return body


def in_thread(name: str) -> Any:
    def body(state: State) -> State:
        get_stream_writer()({"from": name})
        act(name)
        return {"log": [name]}

    return body


def chain(*nodes: tuple[str, Any, dict[str, Any]], **compiled: Any) -> Any:
    builder = StateGraph(State)
    before = START
    for name, body, options in nodes:
        builder.add_node(name, body, **options)
        builder.add_edge(before, name)
        before = name
    return builder.compile(**compiled)


# retried: both layers, in coroutines and in threads.


@retry(
    stop=stop_after_attempt(3),
    wait=wait_fixed(0.001),
    retry=retry_if_exception_type(Fault),
    reraise=True,
)
async def look_up() -> None:
    await play("look_up")


@retry(
    stop=stop_after_attempt(2),
    wait=wait_fixed(0.001),
    retry=retry_if_exception_type(Fault),
    reraise=True,
)
def reckon() -> None:
    act("reckon")


async def calls(state: State) -> State:
    await asyncio.gather(look_up(), look_up())
    await play("calls")
    return {"log": ["calls"]}


def calls_in_thread(state: State) -> State:
    reckon()
    act("calls_in_thread")
    return {"log": ["calls_in_thread"]}


retried = chain(
    ("first", node("first"), {"retry_policy": SOON}),
    ("calls", calls, {"retry_policy": SOON}),
    ("calls_in_thread", calls_in_thread, {"retry_policy": SOON}),
    ("plain", in_thread("plain"), {}),
)


# patient: a node, and a call, whose back-off outlasts every test.


@retry(stop=stop_after_attempt(2), wait=wait_fixed(3600), reraise=True)
async def dial() -> None:
    await play("dial")


async def phones(state: State) -> State:
    await dial()
    return {"log": ["phones"]}


patient = chain(
    ("sleeps", node("sleeps"), {"retry_policy": LATE}),
    ("phones", phones, {}),
)


# nested: a retried node in a retried subgraph, and a graph that a function calls.

inner = chain(
    ("early", node("early"), {"retry_policy": SOON}),
    ("later", in_thread("later"), {}),
)


async def by_function(state: State) -> State:
    found = await inner.ainvoke({"n": state.get("n", 0)})
    await play("by_function")
    return {"log": found["log"]}


nested = chain(
    ("within", inner, {"retry_policy": SOON}),
    ("by_function", by_function, {"retry_policy": SOON}),
)


# fanned: one task for each item.


async def work(state: State) -> State:
    await play(f"work-{state['n']}")
    return {"log": [state["n"]]}


def _fanned() -> Any:
    builder = StateGraph(State)
    builder.add_node("work", work, retry_policy=SOON)
    builder.add_node("sum", node("sum"))
    builder.add_conditional_edges(
        START, lambda state: [Send("work", {"n": n}) for n in range(state["n"])], ["work"]
    )
    builder.add_edge("work", "sum")
    return builder.compile()


fanned = _fanned()


# asks: in a node, inside of a retried call, and in a subgraph.


@retry(stop=stop_after_attempt(3), wait=wait_fixed(0.001))
async def ask_patiently() -> Any:
    return interrupt({"question": "really?"})


async def ask(state: State) -> State:
    await play("ask")
    return {"log": [interrupt({"question": "go on?"})]}


async def ask_again(state: State) -> State:
    return {"log": [await ask_patiently()]}


asks = chain(
    ("before", node("before"), {}),
    ("ask", ask, {"retry_policy": SOON}),
    ("after", chain(("ask_again", ask_again, {})), {}),
)


# timed: a node that may take a little while only.

timed = chain(("brief", node("brief"), {"timeout": 0.03, "retry_policy": SOON}))


# cached: the same question twice.


async def dear(state: State) -> State:
    await play("dear")
    return {"log": [f"dear {state['n']}"]}


def _cached() -> Any:
    builder = StateGraph(State)
    policy = CachePolicy(key_func=lambda state: str(state["n"]))
    builder.add_node("dear", dear, cache_policy=policy)
    builder.add_node("cheap", node("cheap"))
    builder.add_edge(START, "dear")
    builder.add_edge("dear", "cheap")
    builder.add_conditional_edges(
        "cheap", lambda state: "dear" if len(state["log"]) < 4 else END, ["dear", END]
    )
    return builder.compile(cache=InMemoryCache())


cached = _cached()


# commands: a subgraph that ends by a command to the graph around it.


async def jump(state: State) -> Command[Any]:
    await play("jump")
    return Command(graph=Command.PARENT, goto="target", update={"log": ["jump"]})


def _commands() -> Any:
    builder = StateGraph(State)
    inside = StateGraph(State)
    inside.add_node("jump", jump, retry_policy=SOON)
    inside.add_edge(START, "jump")
    builder.add_node("sub", inside.compile(), destinations=("target",))
    builder.add_node("target", node("target"))
    builder.add_edge(START, "sub")
    return builder.compile()


commands = _commands()


# steps: LangGraph's functional API.


@task(retry_policy=SOON)
async def step(n: int) -> int:
    await play(f"step-{n}")
    return n + 1


@task
def step_in_thread(n: int) -> int:
    act("step_in_thread")
    return n + 1


@entrypoint()
async def steps(given: dict[str, Any]) -> dict[str, Any]:
    found = await asyncio.gather(*(step(n) for n in range(given["n"])))
    return {"found": [*found, await step_in_thread(given["n"])]}


# held: waits for its end.

held = chain(("hold", node("hold"), {}), ("last", node("last"), {}))


# speaks: a chat model that streams, and a tool.


class Model(BaseChatModel):
    """Streams four words, and tells what they cost."""

    model: str = "parrot"

    @property
    def _llm_type(self) -> str:
        return "parrot"

    def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
        return {**super()._get_ls_params(stop, **kwargs), "ls_model_name": self.model}

    def _chunks(self) -> Iterator[ChatGenerationChunk]:
        for word in ("four ", "words ", "of ", "mine"):
            yield ChatGenerationChunk(message=AIMessageChunk(word))
        usage: Any = {
            "input_tokens": 5,
            "output_tokens": 4,
            "total_tokens": 9,
            "input_token_details": {"cache_read": 2, "cache_creation": 1},
            "output_token_details": {"reasoning": 1},
        }
        about = {"model_name": "parrot-1", "finish_reason": "stop"}
        last = AIMessageChunk("", usage_metadata=usage, response_metadata=about)
        yield ChatGenerationChunk(message=last)

    def _stream(self, messages: Any, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
        yield from self._chunks()

    async def _astream(self, messages: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:
        for chunk in self._chunks():
            await play("model")
            yield chunk

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("four words of mine"))])


@tool
async def weigh(thing: str) -> str:
    """Weigh a thing."""
    await play("weigh")
    return f"{len(thing)} kg"


async def speak(state: State) -> State:
    answer = await Model().ainvoke("how heavy is a parrot?")
    call: Any = {"name": "weigh", "args": {"thing": "parrot"}, "id": "c-1", "type": "tool_call"}
    weight = await weigh.ainvoke(call)
    return {"log": [str(answer.text), str(weight.content)]}


speaks = chain(("speak", speak, {"retry_policy": SOON}))

# odd: what is rare, each in a node of its own; the input says which.


class Opaque:
    """What JSON cannot hold."""


async def writes_opaque(state: State) -> State:
    get_stream_writer()({"value": Opaque()})
    return {}


async def blocks(state: State) -> State:
    time.sleep(0.3)  # noqa: ASYNC251 -- that is the point
    return {}


async def requests(state: State) -> State:
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds="/nowhere")) as client:
        with contextlib.suppress(httpx.ConnectError):
            await client.get("http://example.test/")
    return {}


async def raises_at_length(state: State) -> State:
    def deeper(left: int) -> None:
        if left:
            deeper(left - 1)
        raise Fatal("long " * 1_000)

    deeper(50)
    return {}


async def asks_a_long_name(state: State) -> State:
    await Model(model="m" * 5_000).ainvoke("hi")
    return {}


def _odd() -> Any:
    builder = StateGraph(State)
    bodies = (writes_opaque, blocks, requests, asks_a_long_name, raises_at_length)
    for body in bodies:
        builder.add_node(body.__name__, body)
    builder.add_conditional_edges(START, lambda state: [body.__name__ for body in bodies])
    return builder.compile()


odd = _odd()

# private: a secret in all places that a graph has for content.


class Secret(TypedDict, total=False):
    secret: str
    how: str
    log: Annotated[list[Any], operator.add]


@tool
async def repeat(text: str) -> str:
    """Say it again."""
    return text


@tool
async def count(number: int) -> int:
    """Count to a number."""
    return number


@tool
async def complain(text: str) -> str:
    """Raise what was said."""
    raise ToolException(text)


complain.handle_tool_error = True


@retry(stop=stop_after_attempt(2), wait=wait_fixed(0.001), reraise=True)
async def keep(secret: str) -> str:
    await play("keep")
    return secret


async def tells(state: Secret) -> Secret:
    secret = state["secret"]
    get_stream_writer()({"secret": secret})
    answer = await GenericFakeChatModel(messages=iter([AIMessage(secret)])).ainvoke(
        [SystemMessage(secret), HumanMessage(secret)]
    )
    for each in (repeat, complain):
        call: Any = {"name": each.name, "args": {"text": secret}, "id": "c", "type": "tool_call"}
        await each.ainvoke(call)
    await keep(secret)
    await play("tells")
    return {"log": [answer.text, secret]}


async def asks_for(state: Secret) -> Secret:
    return {"log": [interrupt({"secret": state["secret"]})]}


def _private() -> Any:
    inside = StateGraph(Secret)
    inside.add_node("tells", tells, retry_policy=SOON)
    inside.add_edge(START, "tells")
    builder = StateGraph(Secret)
    builder.add_node("inside", inside.compile())
    builder.add_node("asks_for", asks_for)
    builder.add_conditional_edges(
        START, lambda state: [Send("inside", {"secret": state["secret"]})], ["inside"]
    )
    builder.add_edge("inside", "asks_for")
    return builder.compile()


private = _private()


# careless: errors with the secret in them, by the library or by the author.


class Typed(BaseModel):
    amount: int = 0


async def spoils(state: Typed) -> Any:
    return {"amount": get_config()["configurable"]["secret"]}


async def reads(state: Typed) -> Any:
    return {}


typed_builder = StateGraph(Typed)
typed_builder.add_node("spoils", spoils)
typed_builder.add_node("reads", reads)
typed_builder.add_edge(START, "spoils")
typed_builder.add_edge("spoils", "reads")
typed = typed_builder.compile()


async def fails(state: Secret) -> Secret:
    secret = state["secret"]
    match state["how"]:
        case "an argument that does not validate":
            await count.ainvoke({"number": secret})
        case "a cause that does not validate":
            try:
                await count.ainvoke({"number": secret})
            except ValidationError as exc:
                raise ValueError("the model called it wrongly") from exc
        case "a context that does not validate":
            try:
                await count.ainvoke({"number": secret})
            except ValidationError:
                raise ValueError("the model called it wrongly")  # noqa: B904
        case "a message":
            raise ValueError(f"cannot do {secret}")
        case "the message of a cause":
            raise ValueError("cannot do it") from KeyError(secret)
        case "a note":
            error = ValueError("cannot do it")
            error.add_note(secret)
            raise error
        case "the message of a tool's error":
            await complain.model_copy(update={"handle_tool_error": False}).ainvoke(secret)
        case "the message of a call's error":
            await _mislaid(secret)
        case "the messages of a group":
            raise ExceptionGroup("several", [ValueError(secret), KeyError(secret)])
    return {}


@retry(stop=stop_after_attempt(2), wait=wait_fixed(0.001), reraise=True)
async def _mislaid(secret: str) -> None:
    raise KeyError(secret)


careless_builder = StateGraph(Secret)
careless_builder.add_node("fails", fails, retry_policy=SOON)
careless_builder.add_edge(START, "fails")
careless = careless_builder.compile()

NAMES = (
    *("retried", "patient", "nested", "fanned", "asks", "timed", "cached", "commands", "steps"),
    *("held", "speaks", "odd", "private", "careless", "typed"),
)


def graph_file(folder: Path) -> Path:
    """A langgraph.json of all of them, in this process's own module."""
    path = folder / "langgraph.json"
    path.write_text(json.dumps({"graphs": {name: f"{__name__}:{name}" for name in NAMES}}))
    return path
