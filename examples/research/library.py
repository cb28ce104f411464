"""What can be looked up: a few topics, each with some sources."""

import json
from functools import cache
from pathlib import Path

from typing_extensions import TypedDict


class Source(TypedDict):
    title: str
    year: int
    text: str


class Topic(TypedDict):
    title: str
    #: A question is about a topic when it has one of these in it.
    words: list[str]
    sources: list[Source]


@cache
def topics() -> dict[str, Topic]:
    found: dict[str, Topic] = json.loads(
        (Path(__file__).parent / "data" / "library.json").read_text("utf-8")
    )
    return found


def topics_of(question: str) -> list[str]:
    """The topics that the question names; all of them when it names none."""
    asked = question.lower()
    named = [key for key, topic in topics().items() if any(w in asked for w in topic["words"])]
    return named or list(topics())
