"""What the stand-in says: the same words for the same conversation, and no model anywhere."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: A message of the conversation, as OpenAI's API writes it.
Message = dict[str, Any]

FAULT = re.compile(r"#(429|500|cut|slow)\b")
SUM = re.compile(r"[\d(](?:[\d\s.()]*[-+*/][\d\s.()]*)+[\d)]")
ORDER = re.compile(r"\b\d{4}\b")
PARCEL = re.compile(r"paquete|llega|dónde|parcel|where", re.IGNORECASE)
REFUND = re.compile(r"devu[eé]l|devol|reembols|refund|pay back", re.IGNORECASE)

HELLO = (
    "Puedo mirar un pedido, seguir su paquete, devolver su importe y hacer cuentas. "
    "Pregunta, por ejemplo, por el pedido 1002. He leído: «{}»."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A tool that is to be called."""

    name: str
    args: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Either a text or calls."""

    text: str = ""
    calls: tuple[Call, ...] = ()


def answer(messages: list[Message]) -> Answer:
    """The next thing to say: the calls that the last question needs, one round after the other."""
    question, since = last_question(messages)
    results = [text_of(message) for message in since if message["role"] == "tool"]
    done = sum(message["role"] == "assistant" for message in since)
    for calls in list(rounds(question, results))[done:]:
        return Answer(calls=calls)
    if not results:
        return Answer(text=HELLO.format(question))
    if len(results) == 1:
        return Answer(text=results[0])
    return Answer(text="\n".join(("Esto es lo que he averiguado:", *(f"- {r}" for r in results))))


def rounds(question: str, results: list[str]) -> Iterator[tuple[Call, ...]]:
    sums = [Call(name="calculate", args={"expression": s}) for s in SUM.findall(question)]
    orders = [int(number) for number in ORDER.findall(SUM.sub(" ", question))]
    look = "track_parcel" if PARCEL.search(question) else "find_order"
    if first := (*sums, *(Call(name=look, args={"number": number}) for number in orders)):
        yield first
    if REFUND.search(question):
        # None that was not found.
        known = [n for n in orders if not any(f"No hay ningún pedido {n}" in r for r in results)]
        if known:
            yield tuple(Call(name="refund_order", args={"number": n}) for n in known)


def faults_in(messages: list[Message]) -> set[str]:
    """What the last question tells to go wrong."""
    for message in reversed(messages):
        if message["role"] == "user":
            return set(FAULT.findall(text_of(message)))
    return set()


def last_question(messages: list[Message]) -> tuple[str, list[Message]]:
    """What was asked for last, without its faults, and what came after it."""
    for at in range(len(messages) - 1, -1, -1):
        if messages[at]["role"] == "user":
            return FAULT.sub("", text_of(messages[at])).strip(), messages[at + 1 :]
    return "", messages


def text_of(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
