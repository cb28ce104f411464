"""Which metrics and labels a PromQL expression names: a scanner, not a parser."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Named", "named"]

_TOKEN = re.compile(
    r"""
      (?P<string> "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | `[^`]*` )
    | (?P<window> \[ [^\]]* \] )
    | (?P<number> \d[\w.]* )
    | (?P<variable> \$\w+ )
    | (?P<name> [a-zA-Z_:][\w:]* )
    | (?P<sign> [{}(),] | [=!<>~]+ | [-+*/%^@] )
    | (?P<space> \s+ )
    """,
    re.VERBOSE,
)
_LABELS_FOLLOW = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


@dataclass(frozen=True, slots=True)
class Named:
    """What an expression names."""

    #: Metric and the labels that its selector matches, once for each selector.
    selectors: tuple[tuple[str, frozenset[str]], ...]
    #: Labels that it groups or joins by.
    grouped: frozenset[str]
    #: What is matched by: label and value, quotes left out.
    values: frozenset[tuple[str, str, str]]
    #: Functions with a window, and the window.
    windows: tuple[tuple[str, str], ...]

    @property
    def metrics(self) -> set[str]:
        return {metric for metric, _ in self.selectors}


def named(expr: str) -> Named:
    """Raises ValueError at what is no PromQL at all."""
    tokens = list(_tokens(expr))
    selectors: list[tuple[str, frozenset[str]]] = []
    grouped: set[str] = set()
    values: set[tuple[str, str, str]] = set()
    windows: list[tuple[str, str]] = []
    called: list[str] = []  # the functions around
    place = 0
    while place < len(tokens):
        kind, text = tokens[place]
        place += 1
        after = tokens[place][1] if place < len(tokens) else ""
        if kind == "window":
            windows.append((called[-1] if called else "", text[1:-1]))
        elif text == "(":
            called.append("")
        elif text == ")":
            called.pop()
        elif kind != "name" or text.lower() in _WORDS:
            if text == "offset" and place < len(tokens):
                place += 1
        elif text in _LABELS_FOLLOW:
            if after == "(":
                end = _closing(tokens, place, ")")
                grouped |= {label for sort, label in tokens[place:end] if sort == "name"}
                place = end + 1
        elif after == "(":
            called.append(text)
            place += 1
        elif after == "by" or after == "without":  # sum by (...) (...)
            called_name = text
            end = _closing(tokens, place, ")")
            grouped |= {label for sort, label in tokens[place + 2 : end] if sort == "name"}
            place = end + 1
            if place < len(tokens) and tokens[place][1] == "(":
                called.append(called_name)
                place += 1
        else:
            end = _closing(tokens, place, "}") if after == "{" else place
            inside = tokens[place:end]
            matched = {label for sort, label in inside if sort == "name"}
            selectors.append((text, frozenset(matched)))
            for at, (sort, label) in enumerate(inside):
                if sort == "name":
                    values.add((label, inside[at + 1][1], inside[at + 2][1][1:-1]))
            place = end + 1 if after == "{" else place
    return Named(tuple(selectors), frozenset(grouped), frozenset(values), tuple(windows))


def _tokens(expr: str) -> list[tuple[str, str]]:
    found, place = [], 0
    while place < len(expr):
        match = _TOKEN.match(expr, place)
        if match is None:
            raise ValueError(f"no PromQL from here on: {expr[place:]!r}")
        if match.lastgroup != "space":
            found.append((str(match.lastgroup), match.group()))
        place = match.end()
    return found


def _closing(tokens: list[tuple[str, str]], place: int, sign: str) -> int:
    while tokens[place][1] != sign:
        place += 1
    return place
