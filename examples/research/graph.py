"""Looks into a question from several sides at once, and publishes what a person approves."""

import asyncio
import operator
from typing import Annotated, Any, Literal

from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, RetryPolicy, Send, interrupt
from library import Source, topics, topics_of
from pace import PACE
from scribe import Scribe
from typing_extensions import TypedDict

DEFAULT_QUESTION = "¿Qué hace fiable a un agente de larga duración?"
#: How often `fetch_sources` fails before it works, in every run.
FAULTS = 2
YES = {"sí", "si", "s", "yes", "y", "ok", "vale"}


class Finding(TypedDict):
    summary: str
    sources: list[str]
    newest: int


class Request(TypedDict, total=False):
    question: str


class Report(TypedDict):
    title: str
    text: str


class Research(Request, total=False):
    topics: list[str]
    sources: dict[str, list[Source]]
    #: By topic. Parallel visits of `investigate` add theirs; a thread keeps what it has learnt.
    findings: Annotated[dict[str, Finding], operator.or_]
    ranking: list[str]
    #: What the reviewer wants changed.
    notes: list[str]
    draft: str
    published: Report | None


class Lead(TypedDict, total=False):
    """What one visit of `investigate` works on; only the findings go back to the research."""

    topic: str
    sources: list[Source]
    passages: list[Source]
    findings: dict[str, Finding]


class Learnt(TypedDict):
    findings: dict[str, Finding]


model = Scribe(pause_s=0.02 * PACE)


def plan(state: Request) -> Research:
    question = state.get("question") or DEFAULT_QUESTION
    return {
        "question": question,
        "topics": topics_of(question),
        "notes": [],
        "published": None,
    }


async def fetch_sources(state: Research, runtime: Runtime[None]) -> Research:
    """The library does not answer at first: that is left to the node's retry policy."""
    await asyncio.sleep(0.1 * PACE)
    info = runtime.execution_info
    if info is not None and info.node_attempt <= FAULTS:
        raise ConnectionError("the library does not answer")
    return {"sources": {topic: topics()[topic]["sources"] for topic in state["topics"]}}


def each_topic(state: Research) -> list[Send]:
    return [
        Send("investigate", Lead(topic=topic, sources=state["sources"][topic]))
        for topic in state["topics"]
    ]


async def search(state: Lead) -> Lead:
    """Keeps the two newest sources."""
    await asyncio.sleep(0.2 * PACE)
    newest_first = sorted(state["sources"], key=lambda source: -source["year"])
    kept, title = newest_first[:2], topics()[state["topic"]]["title"]
    # A line for who watches the stream: passages are no output, so no update shows them.
    get_stream_writer()({"message": f"{title}: leo {len(kept)} de {len(newest_first)} fuentes"})
    return {"passages": kept}


async def summarise(state: Lead) -> Learnt:
    passages = state["passages"]
    summary = await ask("Resume cada línea.", *(passage["text"] for passage in passages))
    finding = Finding(
        summary=summary,
        sources=[passage["title"] for passage in passages],
        newest=max(passage["year"] for passage in passages),
    )
    return {"findings": {state["topic"]: finding}}


def rank(state: Research) -> Research:
    """Puts the topic with the newest sources first."""
    findings = state["findings"]
    return {"ranking": sorted(state["topics"], key=lambda topic: -findings[topic]["newest"])}


async def write(state: Research) -> Research:
    lines: list[str] = []
    for topic in state["ranking"]:
        lines += ["", f"## {topics()[topic]['title']}", state["findings"][topic]["summary"]]
    if state["notes"]:
        lines += ["", "## Revisión", *(f"- {note}" for note in state["notes"])]
    return {"draft": await ask("Redacta el informe.", *lines)}


def approve(state: Research) -> Command[Literal["publish", "write", "approve", "__end__"]]:
    """Waits for a person: yes publishes, no ends, and any other text is a wish for the draft."""
    answer = interrupt(
        {
            "question": "¿Publico este informe?",
            "title": state["question"],
            "draft": state["draft"],
            "answers": ['{"approve": true}', '{"approve": false}', "un texto con lo que falta"],
        }
    )
    match answer:
        case {"approve": True} | True:
            return Command(goto="publish")
        case {"approve": False} | False:
            return Command(goto="__end__")
        case str(text) if text.strip().lower() in YES:
            return Command(goto="publish")
        case str(text) if text.strip():
            return Command(goto="write", update={"notes": [*state["notes"], text.strip()]})
        case _:
            return Command(goto="approve")


def publish(state: Research) -> Research:
    return {"published": Report(title=state["question"], text=state["draft"])}


async def ask(task: str, *lines: str) -> str:
    reply = await model.ainvoke([SystemMessage(task), HumanMessage("\n".join(lines).strip())])
    return str(reply.text)


def investigate() -> Any:
    """A graph of its own: it is one node of the research, and its steps are seen inside it."""
    lead = StateGraph(Lead, output_schema=Learnt)
    lead.add_node("search", search)
    lead.add_node("summarise", summarise)
    lead.add_edge(START, "search")
    lead.add_edge("search", "summarise")
    lead.add_edge("summarise", END)
    return lead.compile()


builder = StateGraph(Research, input_schema=Request)
builder.add_node("plan", plan)
builder.add_node(
    "fetch_sources",
    fetch_sources,
    # No jitter: it would add up to a second to each of these short waits.
    retry_policy=RetryPolicy(
        initial_interval=0.2 * PACE, max_attempts=FAULTS + 1, jitter=False, retry_on=ConnectionError
    ),
)
builder.add_node("investigate", investigate())
builder.add_node("rank", rank)
builder.add_node("write", write)
builder.add_node("approve", approve)
builder.add_node("publish", publish)
builder.add_edge(START, "plan")
builder.add_edge("plan", "fetch_sources")
builder.add_conditional_edges("fetch_sources", each_topic, ["investigate"])
builder.add_edge("investigate", "rank")
builder.add_edge("rank", "write")
builder.add_edge("write", "approve")
builder.add_edge("publish", END)

#: It needs a checkpointer to wait for an answer: a server gives its own.
graph = builder.compile()
