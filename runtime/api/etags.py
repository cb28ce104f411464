"""Versions of bodies that are asked for again and again (RFC 9110, 8.8.3 and 13.1.2)."""

from __future__ import annotations

import hashlib

from fastapi import Request

__all__ = ["etag_of", "is_known"]


def etag_of(body: bytes) -> str:
    """The tag of a body: the same for the same bytes."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def is_known(request: Request, etag: str) -> bool:
    """Whether If-None-Match names this version; a proxy may have made it weak."""
    header = request.headers.get("if-none-match", "")
    tags = (tag.strip().removeprefix("W/") for tag in header.split(","))
    return any(tag in (etag, "*") for tag in tags)
