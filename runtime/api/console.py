"""The page at `/`: files of runtime/console, read once, served as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from runtime.api.etags import etag_of, is_known
from runtime.errors import NotFound

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}
#: Nothing but our own files, no inline script or style, nobody's frame; text is never markup.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Asked for again each time, answered with a 304: a new version is never mixed with an old one.
    "Cache-Control": "no-cache",
    "Accept-Ranges": "none",
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """What a browser sees first."""
    return _answer("index.html", request)


@router.api_route("/console/{name:path}", methods=["GET", "HEAD"])
async def part(name: str, request: Request) -> Response:
    """What the page is made of."""
    return _answer(name, request)


def _answer(name: str, request: Request) -> Response:
    # A name is a key and never becomes a path, so there is nothing to climb out of.
    file = _files().get(name)
    if file is None:
        raise NotFound(f"the page has no file {name!r}")
    headers = {**HEADERS, "ETag": file.etag}
    if is_known(request, file.etag):
        return Response(status_code=304, headers=headers)
    body = b"" if request.method == "HEAD" else file.body
    headers["Content-Length"] = str(len(file.body))
    return Response(body, headers={**headers, "Content-Type": file.media_type})


@cache
def _files() -> Mapping[str, _File]:
    found: dict[str, _File] = {}
    for file in (files("runtime") / "console").iterdir():
        media_type = MEDIA_TYPES.get("." + file.name.rpartition(".")[2])
        if media_type is not None:
            body = file.read_bytes()
            found[file.name] = _File(body, media_type, etag_of(body))
    return found
