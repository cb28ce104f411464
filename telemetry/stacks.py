"""Shows an exception's stack as text, with the messages of its exceptions or without them."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Iterator

from telemetry.contract import classify

__all__ = ["quotes", "stack"]

_LONGEST = 16_000
#: How far causes and groups are followed where messages are left out.
_DEEPEST = 25
_WIDEST = 15
#: How many exceptions of a chain are asked whether they quote the input.
_MOST_QUOTED = 100

_CAUSE = "\nThe exception above caused this one:\n\n"
_CONTEXT = "\nWhile the exception above was handled, this one happened:\n\n"


def stack(error: BaseException, *, messages: bool = True) -> str:
    """The stack of an error, its causes and its group, cut in the middle. Never raises.

    Without messages, too, where one of them quotes the input.
    """
    try:
        messages = messages and not quotes(error)
        text = "".join(traceback.format_exception(error) if messages else _types(error, 0, set()))
    except BaseException:  # a hostile cause or note
        return ""
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]}\n…\n{text[-half:]}"
    return text


def quotes(error: BaseException) -> bool:
    """Whether something in an error's chain did not validate: its message quotes the input."""
    seen: set[int] = set()
    left: list[BaseException] = [error]
    while left and len(seen) < _MOST_QUOTED:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if classify(one) == "validation":
            return True
        left += [e for e in (one.__cause__, one.__context__) if e is not None]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions
    return False


def _types(error: BaseException, depth: int, seen: set[int]) -> Iterator[str]:
    """Frames and types only: a message may also hide in a note or a SyntaxError's line."""
    seen.add(id(error))
    cause, relation = error.__cause__, _CAUSE
    if cause is None and not error.__suppress_context__:
        cause, relation = error.__context__, _CONTEXT
    if cause is not None and id(cause) not in seen and depth < _DEEPEST:
        yield from _types(cause, depth + 1, seen)
        yield relation
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(error.__traceback__)
    yield f"{_name(type(error))}\n"
    if isinstance(error, BaseExceptionGroup) and depth < _DEEPEST:
        for number, inner in enumerate(error.exceptions[:_WIDEST], 1):
            yield f"  {number} of {len(error.exceptions)}:\n"
            yield textwrap.indent("".join(_types(inner, depth + 1, seen)), "    ")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
