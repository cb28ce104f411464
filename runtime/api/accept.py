"""What an `Accept` header likes best of what an address can answer (RFC 9110, 12.5.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from fastapi import Request

from runtime.errors import InvalidRequest

__all__ = ["NotAcceptable", "chosen", "preferred"]

#: Characters of a header that are looked at: it is read on the event loop.
LONGEST = 1024


class NotAcceptable(InvalidRequest):
    """None of the forms that an address has is one that the client takes."""

    code = "not_acceptable"

    def __init__(self, accept: str, offers: Sequence[str]) -> None:
        super().__init__(
            "Accept",
            f"{accept[:100]!r} takes nothing of what there is: "
            f"ask for {' or '.join(offers)}, or leave the header out",
        )


def chosen(request: Request, offers: Sequence[str]) -> str:
    """The offer that a request likes best; the first when it does not say. Raises NotAcceptable."""
    accept = ", ".join(request.headers.getlist("accept"))
    offer = preferred(accept, offers)
    if offer is None:
        raise NotAcceptable(accept, offers)
    return offer


def preferred(accept: str, offers: Sequence[str]) -> str | None:
    """The offer with the highest quality, None when the header takes none of them.

    Among equals one that is named goes before one that only a wildcard covers, what is named
    earlier before what is named later, and an earlier offer before a later one.
    """
    if len(accept) > LONGEST:
        accept = accept[:LONGEST].rpartition(",")[0]  # a range that is cut says something else
    ranges = [_range(part, at) for at, part in enumerate(accept.split(",")) if part.strip()]
    if not ranges:
        return offers[0]
    best, liked = None, _NOT_AT_ALL
    for offer in offers:
        fitting = [range for range in ranges if range.covers(offer)]
        # The most exact range decides, so `*/*, text/html;q=0` refuses HTML alone.
        decides = max(fitting, key=lambda range: range.exactness, default=_NOT_AT_ALL)
        if decides.quality > 0 and decides.rank > liked.rank:
            best, liked = offer, decides
    return best


class _Range(NamedTuple):
    """A part of the header: `type/*;q=0.5`."""

    type: str
    quality: float
    #: Its place in the header.
    at: int

    @property
    def exactness(self) -> int:
        return 0 if self.type == "*/*" else 1 if self.type.endswith("/*") else 2

    @property
    def rank(self) -> tuple[float, int, int]:
        """What to compare ranges of different offers by."""
        return self.quality, self.exactness, -self.at

    def covers(self, offer: str) -> bool:
        family = offer.partition("/")[0]
        return self.type in (offer, f"{family}/*", "*/*")


_NOT_AT_ALL = _Range("", 0.0, 0)


def _range(text: str, at: int) -> _Range:
    """Parameters other than `q` do not tell our forms apart; a `q` that is no number is 0."""
    type, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = 1.0
    for name, _, value in (parameter.partition("=") for parameter in parameters):
        if name.strip() == "q":
            quality = _quality(value.strip())
    return _Range("*/*" if type == "*" else type, quality, at)


def _quality(text: str) -> float:
    # So and not by float() alone, which takes `1_0`, `1e3` and `nan` for numbers.
    if re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text) is None:
        return 0.0
    return min(float(text), 1.0)
