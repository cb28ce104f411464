"""Screens the candidates for a job, one by one, then books interviews and writes to everybody."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
from flaky import flaky_office
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from outside import Calendar, Mail
from pace import PACE
from typing_extensions import TypedDict

DATA = Path(__file__).parent / "data"
DEFAULT_JOB = "backend-engineer"


class Opening(TypedDict):
    title: str
    must: list[str]
    nice: list[str]
    years: int
    #: The lowest score that is asked to an interview.
    threshold: int
    #: How many are asked at most.
    interviews: int


class Candidate(TypedDict):
    id: str
    name: str
    email: str
    years: int
    skills: list[str]


class Notification(TypedDict):
    candidate: str
    text: str


class Request(TypedDict, total=False):
    #: The name of a file in data/jobs.
    job: str


class Screening(Request, total=False):
    #: New with each run, so that a second run on a thread books anew.
    round_id: str
    opening: Opening
    candidates: list[Candidate]
    #: From 0 to 100, by the candidate's id; who is not in it waits for a visit of `score`.
    scores: dict[str, int]
    shortlist: list[str]
    interviews: dict[str, str]
    notifications: list[Notification]


@asynccontextmanager
async def graph() -> AsyncIterator[CompiledStateGraph[Any, Any, Any, Any]]:
    """The graph, with the services it needs: they are open for as long as it is."""
    with flaky_office() as office:
        async with screening(office.url) as builder:
            yield builder.compile()


@asynccontextmanager
async def screening(url: str) -> AsyncIterator[StateGraph[Any, Any, Any, Any]]:
    """The graph's plan, with a calendar and a mail at this address."""
    # trust_env: a proxy has no business between two ends of one machine.
    async with httpx2.AsyncClient(base_url=url, trust_env=False) as calendar_http:
        with httpx2.Client(base_url=url, trust_env=False) as mail_http:
            yield build(Calendar(calendar_http), Mail(mail_http))


def build(calendar: Calendar, mail: Mail) -> StateGraph[Any, Any, Any, Any]:
    async def schedule(state: Screening) -> Screening:
        interviews: dict[str, str] = {}
        for candidate in state["shortlist"]:
            interviews[candidate] = await calendar.book(state["round_id"], candidate)
            tell(f"Entrevista con {name_of(state, candidate)}: {interviews[candidate]}")
        return {"interviews": interviews}

    def notify(state: Screening) -> Screening:
        notifications: list[Notification] = []
        for candidate in state["candidates"]:
            text = letter(state, candidate)
            mail.send(state["round_id"], candidate["id"], candidate["email"], text)
            notifications.append({"candidate": candidate["id"], "text": text})
        tell(f"{len(notifications)} mensajes enviados")
        return {"notifications": notifications}

    plan = StateGraph(Screening, input_schema=Request)
    plan.add_node("load", load)
    plan.add_node("score", score)
    plan.add_node("shortlist", shortlist)
    plan.add_node("schedule", schedule)
    plan.add_node("notify", notify)
    plan.add_edge(START, "load")
    plan.add_conditional_edges("load", whats_next)
    plan.add_conditional_edges("score", whats_next)
    plan.add_edge("shortlist", "schedule")
    plan.add_edge("schedule", "notify")
    plan.add_edge("notify", END)
    return plan


def load(state: Request) -> Screening:
    """Reads the job and its candidates, and forgets what an earlier run left on the thread."""
    job = state.get("job", DEFAULT_JOB)
    jobs = {path.stem: path for path in (DATA / "jobs").glob("*.json")}
    if job not in jobs:
        raise ValueError(f"no job {job!r}; there is: {', '.join(sorted(jobs))}")
    return {
        "job": job,
        "round_id": uuid.uuid4().hex[:8],
        "opening": read(jobs[job]),
        "candidates": [read(path) for path in sorted((DATA / "candidates").glob("*.json"))],
        "scores": {},
        "shortlist": [],
        "interviews": {},
        "notifications": [],
    }


def whats_next(state: Screening) -> Literal["score", "shortlist"]:
    return "score" if waiting(state) else "shortlist"


async def score(state: Screening) -> Screening:
    """Scores one candidate per visit."""
    candidate = waiting(state)[0]
    await asyncio.sleep(0.15 * PACE)
    points = points_of(candidate, state["opening"])
    scores = {**state["scores"], candidate["id"]: points}
    done, total = len(scores), len(state["candidates"])
    tell(f"{candidate['name']}: {points} puntos ({done} de {total})", done=done, total=total)
    return {"scores": scores}


def shortlist(state: Screening) -> Screening:
    opening, scores = state["opening"], state["scores"]
    good = [candidate for candidate in scores if scores[candidate] >= opening["threshold"]]
    best = sorted(good, key=lambda candidate: -scores[candidate])
    return {"shortlist": best[: opening["interviews"]]}


def waiting(state: Screening) -> list[Candidate]:
    return [person for person in state["candidates"] if person["id"] not in state["scores"]]


def points_of(candidate: Candidate, opening: Opening) -> int:
    """70 for what is required, 20 for what is welcome, 10 for experience."""
    skills = set(candidate["skills"])
    must = len(skills.intersection(opening["must"])) / len(opening["must"])
    nice = len(skills.intersection(opening["nice"])) / len(opening["nice"])
    years = min(1.0, candidate["years"] / opening["years"])
    return round(70 * must + 20 * nice + 10 * years)


def letter(state: Screening, candidate: Candidate) -> str:
    title, slot = state["opening"]["title"], state["interviews"].get(candidate["id"])
    if slot is None:
        return (
            f"Hola, {candidate['name']}: gracias por tu interés en el puesto de {title}. "
            "Esta vez seguimos con otras candidaturas."
        )
    return f"Hola, {candidate['name']}: hablamos del puesto de {title} el {slot}."


def name_of(state: Screening, candidate: str) -> str:
    return next(person["name"] for person in state["candidates"] if person["id"] == candidate)


def tell(message: str, **numbers: int) -> None:
    """A line for who watches the stream."""
    get_stream_writer()({"message": message, **numbers})


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
