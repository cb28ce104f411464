"""The command line: `sereno serve`, and a client that starts runs on a server and watches them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import httpx2
import orjson
import typer
from rich.text import Text
from typer.core import TyperGroup

from runtime.cli_client import (
    DEFAULT_URL,
    FAILED,
    Follower,
    Refused,
    Server,
    Trouble,
    path_of,
)
from runtime.cli_question import given as given_to
from runtime.cli_screen import Screen, clean
from runtime.cli_surroundings import Surroundings
from runtime.cli_top import TYPES, Keys, Top, rows_of, watch
from runtime.cli_trace import waterfall
from runtime.cli_view import Line, View, graphs_table, runs_table
from runtime.errors import SerenoError, StartupError
from runtime.model import DEFAULT_MODES, MODES
from runtime.monitoring import Edited, write

__all__ = ["app", "main"]

PREFIX = "SERENO_"
#: Variables with the settings' prefix that others read: this command line, images, `resilient`.
OTHER_VARIABLES = (
    "SERENO_URL",
    "SERENO_ADMIN_URL",
    "SERENO_COMMIT",
    "SERENO_RETRY_ATTEMPTS",
    "SERENO_RETRY_MULTIPLIER",
    "SERENO_RETRY_MIN_S",
    "SERENO_RETRY_MAX_S",
)

CANCELLED, UNREAD = 130, 141
#: Exit codes by the status that a run ended with; 1 for every other.
EXIT_CODES: Mapping[str, int] = {"success": 0, "interrupted": 3, "cancelled": CANCELLED}


class _Commands(TyperGroup):
    """Says what went wrong in one line and without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Trouble, SerenoError) as exc:
            _say(str(exc))
            otherwise = 1 if isinstance(exc, StartupError) else Trouble.exit_code
            raise typer.Exit(getattr(exc, "exit_code", otherwise)) from exc
        except BrokenPipeError:  # as after `| head`: who read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(UNREAD) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, or the run succeeded; 1 the run failed or ran out of time, or "
    "serve could not start; 2 a wrong option or input; 3 the run waits for an answer; 4 the "
    "server refused; 5 no server answered; 130 the run was cancelled, or Ctrl-C; 141 nobody "
    "reads the pipe any more.",
)


def _utf8(value: str | None) -> str | None:
    """An argument that goes to a server or a graph; a path may be of any bytes."""
    if value is not None and not _encodable(value):
        raise typer.BadParameter(f"{value!r} is not UTF-8")
    return value


Url = Annotated[
    str, typer.Option("--url", metavar="URL", envvar="SERENO_URL", help="Address of the server.")
]
Json = Annotated[bool, typer.Option("--json", help="Print NDJSON, on a terminal too.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", callback=_utf8, help="Id of the run.")]
Config = Annotated[
    list[str] | None,
    typer.Option("--config", metavar="PATH", help="Path of a langgraph.json; may be repeated."),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sereno {version('sereno')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Say the version."),
    ] = False,
) -> None:
    """Serves LangGraph graphs as durable, resumable NDJSON streams, and watches their runs."""


def main() -> None:
    """The script `sereno`."""
    # In the order of their numbers: what is opened gets the lowest that is free, and no socket
    # or file of ours is then where others write.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, mode))
    app(prog_name="sereno")


@app.command()
def serve(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="SOURCE", help="[name=]module:attr")
    ] = None,
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of the admin listener; 0 takes a free one.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Where runs live: a URL.")] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Serve the graphs that load.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a non-loopback address without API keys.")
    ] = False,
    wait_lock: Annotated[
        bool, typer.Option("--wait-lock", help="Wait for the store's lock.")
    ] = False,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING, ERROR or CRITICAL.")
    ] = None,
) -> None:
    """Serve graphs. Every setting can also be given as SERENO_<NAME>."""
    # What only some commands need, and what takes long to import, is imported by them.
    from runtime import settings

    settled = settings.load(
        host=host,
        port=port,
        admin_port=admin_port,
        engine=engine,
        lenient=lenient or None,
        insecure=insecure or None,
        wait_lock=wait_lock or None,
        log_level=log_level,
    )
    given = _sources(config, sources)
    for unknown in _unknown_variables(f"{PREFIX}{f.upper()}" for f in type(settled).model_fields):
        _say(unknown)
    from runtime.app import serve as serve_until_stopped

    raise typer.Exit(serve_until_stopped(settled, given))


@app.command()
def run(
    ctx: typer.Context,
    graph: Annotated[
        str, typer.Argument(metavar="GRAPH", callback=_utf8, help="Name of the graph.")
    ],
    input: Annotated[
        str | None,
        typer.Option(
            metavar="JSON|@FILE|-",
            help="Input: JSON, a file of it, or - for stdin. Without it, the graph's default "
            "input, else {}. null goes on from the thread's state.",
        ),
    ] = None,
    thread: Annotated[
        str | None,
        typer.Option(metavar="ID", callback=_utf8, help="Thread to run on; a new one if none."),
    ] = None,
    stream: Annotated[
        str | None, typer.Option(metavar="MODES", help=f"What to record, of {','.join(MODES)}.")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Seconds that the run may take.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run here, without a server.")] = False,
    config: Config = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Start a run and watch it. Ctrl-C stops the watching, not the run.

    Exit code: 0 success, 1 error or timeout, 2 wrong input, 3 waits for an answer, 4 refused,
    5 no server, 130 cancelled. Example: sereno run agent --input '{"question": "why?"}'
    """
    modes = _modes(stream)
    if deadline is not None and not math.isfinite(deadline):
        raise Trouble(f"--deadline: {deadline} is not a number of seconds")
    body: dict[str, Any] = {"graph": graph}
    if input is not None:
        body["input"] = _read_input(input)
    if local:
        if deadline is not None:
            raise Trouble("--deadline: needs a server; leave it out or leave --local out")
        view = ctx.ensure_object(Surroundings).view(as_json)
        _run_here(view, graph, body.get("input"), thread, modes, config)
    if config is not None:
        raise Trouble("--config: is for --local; the server at --url has its own graphs")
    server = Server.of(ctx, url)
    if input is None:
        body["input"] = _default_input(server, graph)
    optional = {"thread_id": thread, "stream": modes, "deadline_s": deadline}
    body |= {name: value for name, value in optional.items() if value is not None}
    _watch(Follower.of_new_run(server, "/v1/runs", body), as_json)


@app.command()
def tail(
    ctx: typer.Context,
    run: RunId,
    after: Annotated[
        str, typer.Option(metavar="SEQ", help="Show what comes after this line, or `latest`.")
    ] = "0",
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Watch a run. It is shown from its first line or a cursor on; exit codes as of `run`."""
    if not after.isdecimal() and after != "latest":
        raise Trouble(f"--after: {after!r} is neither a line's seq nor `latest`")
    server = Server.of(ctx, url)
    _watch(Follower.of_run(server, run, after), as_json)


@app.command()
def answer(
    ctx: typer.Context,
    asked: Annotated[
        str,
        typer.Argument(
            metavar="RUN|THREAD", callback=_utf8, help="Who asks: the run, or its thread."
        ),
    ],
    value: Annotated[
        str,
        typer.Argument(
            metavar="VALUE",
            help="JSON, else text; of several questions a JSON object of answers by id. "
            "@FILE is the JSON of a file, - that of stdin.",
        ),
    ],
    text: Annotated[bool, typer.Option("--text", help="VALUE is text, whatever it is.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Answer a run that waits. A new run goes on from there and is watched, as by `run`.

    Examples: sereno answer THREAD yes; sereno answer THREAD '{"approved": true}'
    """
    given = _sent(value, "VALUE") if text else _answer(value)
    server = Server.of(ctx, url)
    thread = asked
    try:
        run = server.get(path_of(asked), "thread_id")
    except Refused as exc:
        if exc.status != httpx2.codes.NOT_FOUND:
            raise
    else:
        thread, given = run["thread_id"], _bound(given, run.get("result") or {})
    _watch(Follower.of_new_run(server, _resume(thread), {"resume": given}), as_json)


@app.command()
def trace(ctx: typer.Context, run: RunId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show where a run's time went. Nodes, attempts and the pauses between them, to scale."""
    server = Server.of(ctx, url)
    answer = server.get(f"{path_of(run)}/trace", "resourceSpans")
    if as_json:
        _print_json(answer)
        return
    screen = server.around.screen(as_json) or Screen()
    screen.print(waterfall(answer, screen.width, server.around.clock()))


@app.command()
def dashboards(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write into.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite edited files.")] = False,
) -> None:
    """Write dashboards and alert rules. The collector configurations come with them."""
    try:
        written = write(folder, force=force)
    except Edited as exc:
        raise Trouble(f"edited, and would be lost without --force: {exc}") from exc
    for path in written:
        typer.echo(path)


@app.command()
def ps(
    ctx: typer.Context,
    status: Annotated[
        str | None, typer.Option(callback=_utf8, help="Only runs with this status.")
    ] = None,
    graph: Annotated[
        str | None, typer.Option(callback=_utf8, help="Only runs of this graph.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most runs to list.")] = 20,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """List runs, newest first."""
    server = Server.of(ctx, url)
    asked = {"status": status, "graph": graph}
    params = {name: value for name, value in asked.items() if value is not None}
    runs, more = server.runs(params, limit)
    if (screen := server.around.screen(as_json)) is None:
        _print_json(*runs)
    elif not runs:
        screen.print("no runs", style="dim")
    else:
        asking = _asking(server, runs, of_all=not params)
        screen.print(runs_table(runs, server.around.clock(), screen.width, asking))
        if more:
            screen.print("there are more; --limit shows them", style="dim")


@app.command()
def top(
    ctx: typer.Context,
    admin_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="SERENO_ADMIN_URL",
            help="Address of the admin listener, which also tells how long runs are silent.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show what a server does now. Until q; once with --json: the server, and then its runs."""
    server = Server.of(ctx, url)
    around = server.around
    admin = None
    if admin_url is not None:
        admin = Server.of(ctx, admin_url, option="--admin-url")
    looking = Top(Source(server, admin), around.clock)
    screen = around.screen(as_json)
    if screen is None:
        _print_json(*looking.look().rows(around.clock()))
    elif not screen.is_interactive:  # it cannot be redrawn
        for text in rows_of(looking.look(), around.clock(), screen.width):
            screen.print(text, highlight=False)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            watch(looking, screen, server.url, around.clock, Keys(around.sleep), away=Trouble)


@app.command()
def cancel(
    ctx: typer.Context,
    run: RunId,
    reason: Annotated[
        str | None, typer.Option(callback=_utf8, help="Why, for the run's last line.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Ask a run to end."""
    server = Server.of(ctx, url)
    body = {"reason": reason} if reason is not None else {}
    status, answer = server.ask("POST", f"{path_of(run)}/cancel", json=body)
    if (screen := server.around.screen(as_json)) is None:
        _print_json(answer)
    elif status == httpx2.codes.ACCEPTED:
        screen.print(Text(f"cancelling run {run}; its end: {server.command('tail', run)}"))
    else:
        screen.print(Text(f"run {run} had ended already: {clean(answer.get('status', '?'))}"))


@app.command()
def graphs(ctx: typer.Context, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """List the graphs that a server has."""
    server = Server.of(ctx, url)
    answer = server.get("/v1/graphs", "graphs")
    if (screen := server.around.screen(as_json)) is None:
        _print_json(*answer["graphs"])
    else:
        screen.print(graphs_table(answer["graphs"]))


# What is asked for.


def _unknown_variables(settings: Iterable[str]) -> Iterator[str]:
    """What to say of variables that look like settings and are none."""
    known = [name.removeprefix(PREFIX) for name in (*settings, *OTHER_VARIABLES)]
    for name in sorted(os.environ):
        given = name.removeprefix(PREFIX)
        if given != name and given not in known:
            near = get_close_matches(given, known, n=1, cutoff=0.7)
            meant = f"did you mean {PREFIX}{near[0]}?" if near else "it changes nothing here"
            yield f"{name} is set and is no setting; {meant}"


def _sources(config: Sequence[str] | None, sources: Sequence[str] | None) -> list[str]:
    given = [*(config or ()), *(sources or ())]
    if not given and not Path("langgraph.json").exists():
        raise Trouble(
            "no langgraph.json in this folder: name one with --config, or give a graph as "
            "module:attr"
        )
    return given or ["langgraph.json"]


def _modes(stream: str | None) -> list[str] | None:
    if stream is None:
        return None
    modes = [mode.strip() for mode in stream.split(",") if mode.strip()]
    for mode in modes:
        if mode not in MODES:
            raise Trouble(f"--stream: {mode!r} is not one of {', '.join(MODES)}")
    return modes


def _read_input(given: str, where: str = "--input") -> Any:
    text: str | bytes = given
    try:
        if given == "-":
            where += " - (stdin)"
            text = sys.stdin.buffer.read()
        elif given.startswith("@"):
            where += f" {given}"
            text = Path(given[1:]).expanduser().read_bytes()
        return _sent(json.loads(text, parse_constant=_no_constant, parse_float=_finite), where)
    except OSError as exc:
        raise Trouble(f"{where}: {exc.strerror or exc}") from exc
    except json.JSONDecodeError as exc:
        place = f"line {exc.lineno} column {exc.colno}"
        raise Trouble(f"{where}: not JSON at {place}: {exc.msg}") from exc
    except (ValueError, RecursionError) as exc:
        raise Trouble(f"{where}: not JSON: {exc}") from exc


def _answer(value: str) -> Any:
    """JSON if it is or looks like that; what a person types is mostly text."""
    if value[:1] not in ("@", "-", "{", "[", '"'):
        try:
            json.loads(value, parse_constant=_no_constant)
        except ValueError:
            return _sent(value, "VALUE")
    return _read_input(value, "VALUE")


def _bound(given: Any, result: Mapping[str, Any]) -> Any:
    """An answer by the id of the one thing that a run asks: its thread may ask another by now."""
    match result.get("interrupts"):
        case [{"id": asked}] if not (isinstance(given, dict) and asked in given):
            return {asked: given}
    return given


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(number: str) -> float:
    """What JSON allows and no server takes: it would be infinite."""
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is too large for a number")
    return value


def _sent(value: Any, where: str) -> Any:
    """A value that can be sent: bytes that are no UTF-8, and escapes like "\\ud800", cannot."""
    if not _encodable(json.dumps(value, ensure_ascii=False)):
        raise Trouble(f"{where}: has characters that are not UTF-8")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _default_input(server: Server, graph: str) -> Any:
    """What the server says that a run of this graph can start from."""
    for known in server.get("/v1/graphs", "graphs")["graphs"]:
        if known["name"] == graph and known.get("default_input") is not None:
            return known["default_input"]
    return {}


def _asking(server: Server, runs: Sequence[Mapping[str, Any]], *, of_all: bool) -> set[str]:
    """The ids of the runs, newest first, whose thread waits for an answer.

    A list of all runs tells itself which is the latest on its thread.
    """
    asking, later = set(), set()
    for run in runs:
        latest = run["thread_id"] not in later
        if of_all:
            later.add(run["thread_id"])
        surely = of_all and run["status"] == "interrupted"
        if latest and (surely or server.asks(run)):
            asking.add(run["run_id"])
    return asking


# Watching a run.


def _watch(follower: Follower, as_json: bool) -> NoReturn:
    """Show a run to its end, and exit as it ended."""
    final: Mapping[str, Any] = {}
    graph, trigger = "GRAPH", ""
    try:
        with follower.server.around.view(as_json, follower.server.command) as view:
            for line in follower.lines(view.note):
                view.line(line)
                final = line.data
                if final["type"] == "run.queued":
                    graph = final["data"].get("graph", graph)
                    trigger = final["data"].get("trigger", trigger)
    except KeyboardInterrupt:
        _say(follower.stopped())
        raise typer.Exit(CANCELLED) from None
    if follower.status is not None:  # nothing was left to show
        _say(f"run {follower.run_id} ended with status {follower.status}; no line comes after that")
        raise typer.Exit(EXIT_CODES.get(follower.status, 1))
    status = final["data"]["status"]
    if status == "interrupted":
        _say(_how_to_answer(final, follower.server, graph))
    elif status in FAILED and trigger == "resume":
        thread = final["thread_id"]
        if asked := follower.server.asked(thread):
            command = follower.server.command("answer", thread, _answers(asked))
            _say(f"the thread still asks; answer again: {command}")
    raise typer.Exit(EXIT_CODES.get(status, 1))


def _run_here(
    view: View,
    graph: str,
    input: Any,
    thread: str | None,
    modes: Sequence[str] | None,
    config: Sequence[str] | None,
) -> NoReturn:
    """A run in this process, from nothing and to nothing."""
    sources = _sources(config, None)
    from runtime import settings

    # Its errors are the caller's own, and stdout belongs to its lines.
    settled = settings.load(engine="memory://", expose_errors=True)
    from runtime.app import local_stream
    from telemetry import logs

    lines = local_stream(settled, sources, graph, input, thread, modes or DEFAULT_MODES)
    try:
        with logs.configure(level="WARNING", stream=sys.stderr.buffer), view:
            final = asyncio.run(_show_all(lines, view))
    except KeyboardInterrupt:
        _say("stopped; the run was in this process and is gone")
        raise typer.Exit(CANCELLED) from None
    if final["status"] == "interrupted":
        _say("the run waits for an answer, which only a server can take: see `sereno serve`")
    raise typer.Exit(EXIT_CODES.get(final["status"], 1))


async def _show_all(lines: AsyncIterator[bytes], view: View) -> Mapping[str, Any]:
    data: Mapping[str, Any] = {"status": "error"}
    async for raw in lines:
        line = Line(raw, orjson.loads(raw))
        view.line(line)
        data = line.data.get("data", {})
    return data


def _how_to_answer(line: Mapping[str, Any], server: Server, graph: str) -> str:
    thread = line["thread_id"]
    asked = line["data"].get("interrupts") or ()
    if isinstance(asked, Mapping):  # too large for the line
        asked = server.asked(thread)
    if not asked:  # a breakpoint: there is no question
        command = server.command("run", graph, "--thread", thread, "--input", "null")
        return f"the run stopped at a breakpoint; let it go on: {command}"
    if len(asked) == 1:
        command = server.command("answer", line["run_id"], _answers(asked))
        return f"the run waits for an answer; give it: {command}"
    command = server.command("answer", thread, _answers(asked))
    return f"the run waits for {len(asked)} answers; give them: {command}"


def _answers(asked: Sequence[Mapping[str, Any]]) -> str:
    """What stands on a command line for the answers to some interrupts."""
    if len(asked) > 1:
        return json.dumps({one["id"]: given_to(one) for one in asked}, ensure_ascii=False)
    answer = given_to(asked[0])
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


class Source:
    """What `top` asks."""

    def __init__(self, server: Server, admin: Server | None) -> None:
        self._server = server
        self._admin = admin
        self._info: Mapping[str, Any] | None = None

    def info(self) -> Mapping[str, Any]:
        if self._info is None:
            self._info = self._server.get("/info", "slots")
        return self._info

    def runs(self, status: str, most: int, since: float = 0) -> Sequence[Mapping[str, Any]]:
        asked = {"status": status}
        if since:
            asked["updated_after"] = datetime.fromtimestamp(since, UTC).isoformat()
        return self._server.runs(asked, most)[0]

    def lines(self, run_id: str, after: int) -> Sequence[Mapping[str, Any]]:
        params = {"after": str(after), "follow": "0", "types": ",".join(TYPES)}
        raw = self._server.fetch(f"{path_of(run_id)}/stream", params)
        # A connection that was cut in a line leaves it for the next look.
        return [orjson.loads(line) for line in raw.split(b"\n")[:-1]]

    def asks(self, row: Mapping[str, Any]) -> bool:
        return self._server.asks(row)

    def live(self) -> Mapping[str, Any] | None:
        if self._admin is None:
            return None
        live: Mapping[str, Any] = self._admin.get("/debug/live", "runs")
        return live


def _resume(thread: str) -> str:
    return f"/v1/threads/{quote(thread, safe='')}/resume"


def _print_json(*rows: Any) -> None:
    for row in rows:
        sys.stdout.buffer.write(orjson.dumps(row) + b"\n")
    sys.stdout.buffer.flush()


def _say(text: str) -> None:
    typer.echo(f"sereno: {clean(text)}", err=True)
