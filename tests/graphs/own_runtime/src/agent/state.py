from dataclasses import dataclass

from typing_extensions import TypedDict


@dataclass
class Greeting:
    text: str


class State(TypedDict, total=False):
    name: str
    greeting: Greeting
    tools: list[str]
