"""What `/` and `/console/*` serve: our own files, strictly, and nothing else."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from runtime.api import console
from runtime.app import create_app
from runtime.settings import Settings

from .harness import Server, problem

FOLDER = files("runtime") / "console"


def names() -> list[str]:
    return sorted(file.name for file in FOLDER.iterdir())


@pytest.mark.parametrize("path", ["/", "/console/app.js", "/console/page.css", "/console/icon.svg"])
async def test_files_carry_the_policy_and_no_range(server: Server, path: str) -> None:
    answer = await server.get(path, headers={"range": "bytes=0-3"})

    assert answer.status == 200
    assert answer.headers["accept-ranges"] == "none"
    assert "content-range" not in answer.headers
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    assert len(answer.body) == int(answer.headers["content-length"])


async def test_a_version_that_is_known_is_not_sent_again(server: Server) -> None:
    etag = (await server.get("/")).headers["etag"]

    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = await server.get("/", headers={"if-none-match": known})
        assert (again.status, again.body) == (304, b"")
        assert again.headers["etag"] == etag
    assert (await server.get("/", headers={"if-none-match": '"other"'})).status == 200


async def test_head_tells_what_get_would(server: Server) -> None:
    head, get = await server.request("HEAD", "/"), await server.get("/")

    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(get.body))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "none.js",
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "/etc/passwd",
        "app.js/",
        "./app.js",
    ],
)
async def test_nothing_else_is_served(server: Server, name: str) -> None:
    problem(await server.get(f"/console/{name}"), 404, "not_found")


@pytest.mark.parametrize("name", names())
async def test_every_file_is_served_as_it_is(server: Server, name: str) -> None:
    answer = await server.get(f"/console/{name}")

    assert answer.body == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] in console.MEDIA_TYPES.values()


def test_the_page_asks_nobody_else_and_has_nothing_inline() -> None:
    html = (FOLDER / "index.html").read_text("utf-8")

    assert re.findall(r"<script[^>]*>(.*?)</script>", html) == [""]
    assert not re.search(r"<style|style=|\son\w+=", html)
    for name in names():
        text = (FOLDER / name).read_text("utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert "innerHTML" not in text, name


def test_every_import_is_a_file_of_the_page() -> None:
    for name in names():
        text = (FOLDER / name).read_text("utf-8")
        for wanted in re.findall(r'(?:from "\./|(?:href|src)="console/)([^"]+)"', text):
            assert (FOLDER / wanted).is_file(), f"{name} wants {wanted}"


def test_the_page_is_not_in_the_openapi_document() -> None:
    paths = create_app(Settings(), []).openapi()["paths"]

    assert not [path for path in paths if path == "/" or path.startswith("/console")]
