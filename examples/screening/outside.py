"""Calls to the world outside: the calendar and the mail, tried again when a fault may pass.

Both can be repeated: the address names the round and the candidate, so nobody is booked or
written to twice. A retry needs that, and so does a run that is recovered after a crash.
"""

import httpx2
from pace import PACE

from runtime.resilience import resilient

#: The standard waits for four to ten seconds; these are quick, so that they can be watched.
#: A `Retry-After` of the server is obeyed as well, whichever is longer.
quickly = resilient(attempts=3, multiplier=0.3 * PACE, min_s=0.3 * PACE, max_s=PACE)


class Calendar:
    """Asynchronous, as a call from an async node should be."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    @quickly
    async def book(self, round_id: str, candidate: str) -> str:
        """Books an interview and says when it is."""
        response = await self._http.put(f"/{round_id}/interviews/{candidate}")
        response.raise_for_status()
        slot: str = response.json()["slot"]
        return slot


class Mail:
    """Synchronous, as many clients are; LangGraph runs a sync node in a thread."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http

    @quickly
    def send(self, round_id: str, candidate: str, to: str, text: str) -> None:
        response = self._http.put(f"/{round_id}/mails/{candidate}", json={"to": to, "text": text})
        response.raise_for_status()
