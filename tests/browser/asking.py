"""Graphs that take every kind of input and ask every kind of question."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from langchain_core.messages import AnyMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime
from langgraph.types import interrupt
from pydantic import BaseModel, Field
from typing_extensions import TypedDict


class Place(TypedDict):
    city: str
    zip: NotRequired[str | None]


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: list[str] = []


class Tree(BaseModel):
    label: str
    children: list[Tree] = []


class Order(BaseModel):
    """Something of everything."""

    customer: str = Field(min_length=2, description="Who orders.")
    amount: int = Field(ge=1, le=10)
    weight: float | None = Field(None, gt=0)
    speed: Literal["slow", "fast"] = "slow"
    gift: bool = Field(False, description="Is it one?")
    fetched: str = Field("monday", description="When it is fetched")
    place: Place
    tags: list[str] = []
    days: set[Literal["mon", "tue"]] = set()
    stock: dict[str, int] = {}
    pet: Cat | Dog | None = Field(None, discriminator="kind")
    code: int | str | None = None
    tree: Tree | None = None
    free: dict[str, Any] = {}
    note: str | None = None


async def echo(state: Order) -> dict[str, Any]:
    return {}


order = StateGraph(Order).add_node("echo", echo).add_edge(START, "echo").compile()


class Chat(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


async def hear(state: Chat) -> Chat:
    return {"messages": []}


chat = StateGraph(Chat).add_node("hear", hear).add_edge(START, "hear").compile()


class Empty(TypedDict, total=False):
    said: Annotated[list[Any], lambda old, new: [*(old or []), *(new or [])]]


@dataclass
class Who:
    user: str
    level: int = 3


async def greet(state: Empty, runtime: Runtime[Who]) -> Empty:
    return {"said": [f"{runtime.context.user} {runtime.context.level}"]}


greeting = (
    StateGraph(Empty, context_schema=Who)
    .add_node("greet", greet)
    .add_edge(START, "greet")
    .compile()
)


class Verdict(BaseModel):
    approved: bool
    score: int = Field(3, ge=1, le=5)
    reasons: list[str] = []


async def judge(state: Empty) -> Empty:
    verdict = interrupt({"question": "What do you think?"}, response_schema=Verdict)
    return {"said": [verdict.model_dump()]}


async def even(state: Empty) -> Empty:
    """Its question's schema is too weak: what it takes is decided by more than a form knows."""
    number = interrupt("An even number?", response_schema=Even)
    return {"said": [number]}


class Even(BaseModel):
    number: Annotated[int, Field(multiple_of=2)]


async def free(state: Empty) -> Empty:
    return {"said": [interrupt("Anything else?")]}


async def vast(state: Empty) -> Empty:
    value = {"question": "All of it?", "text": "vast " * 300_000}
    return {"said": [interrupt(value, response_schema=Verdict).approved]}


async def endless(state: Empty) -> Empty:
    interrupt("For how long?")
    await asyncio.Event().wait()
    return {}


judging = StateGraph(Empty).add_node("judge", judge).add_edge(START, "judge").compile()
asking_free = StateGraph(Empty).add_node("free", free).add_edge(START, "free").compile()
evening = StateGraph(Empty).add_node("even", even).add_edge(START, "even").compile()
asking_two = (
    StateGraph(Empty)
    .add_node("judge", judge)
    .add_node("free", free)
    .add_edge(START, "judge")
    .add_edge(START, "free")
    .add_edge("judge", END)
    .compile()
)
asking_inside = StateGraph(Empty).add_node("inner", judging).add_edge(START, "inner").compile()
asking_much = StateGraph(Empty).add_node("vast", vast).add_edge(START, "vast").compile()
asking_long = StateGraph(Empty).add_node("endless", endless).add_edge(START, "endless").compile()
