"""Which graphs are served, where each comes from, and how to get one to run.

A graph comes from a `langgraph.json`, as LangGraph's own CLI reads it, or from a `module:attr`.
Every such project imports its own modules in its own world (`runtime.projects`):
it may hold a package called `runtime`, as we do, or `agent`, as the project beside it does.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import json
import os
import re
import traceback
import typing
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

import structlog
from dotenv import dotenv_values
from langchain_core.runnables import RunnableConfig
from langgraph.constants import START, TAG_HIDDEN
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from runtime.errors import GraphLoadFailed, UnknownGraph
from runtime.projects import Project, digest

__all__ = ["Graphs", "LoadedGraph"]

#: Characters of a graph's name.
LONGEST_NAME = 128

log = structlog.get_logger("graphs")

Graph: TypeAlias = Pregel[Any, Any, Any, Any]
Factory: TypeAlias = Callable[[RunnableConfig], Any]
Wrap: TypeAlias = Callable[[Graph], Graph]


def _as_it_is(graph: Graph) -> Graph:
    return graph


class Graphs:
    """The graphs of all sources, loaded and held open for as long as it is entered.

    A source is the path of a `langgraph.json` (or of its folder), or `[name=]module:attr` or
    `[name=]./file.py:attr`, relative to the working directory. A graph that cannot be loaded
    raises `GraphLoadFailed`; with `lenient` it is only named in `failures`. What runs has gone
    through `wrap`.
    """

    def __init__(
        self, sources: Sequence[str | Path], lenient: bool = False, *, wrap: Wrap | None = None
    ) -> None:
        self._sources = sources
        self._lenient = lenient
        self._wrap = wrap or _as_it_is
        self._loaded: dict[str, LoadedGraph] = {}
        self._held = AsyncExitStack()
        #: Graph name → why it is not served. Filled only when lenient.
        self.failures: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        entries = _read_sources(self._sources)
        async with AsyncExitStack() as held:
            importlib.invalidate_caches()
            for environment in dict.fromkeys(entry.environment for entry in entries):
                held.enter_context(environment.applied())
            for project in dict.fromkeys(entry.project for entry in entries):
                held.enter_context(project.importable())
            for entry in entries:
                try:
                    self._loaded[entry.name] = await _load(entry, held, self._wrap)
                except GraphLoadFailed as exc:
                    if not self._lenient:
                        raise
                    log.error("graph not served", graph=entry.name, exc_info=exc)
                    self.failures[entry.name] = str(exc)
            self._held = held.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._held.__aexit__(kind, error, trace)

    def __iter__(self) -> Iterator[LoadedGraph]:
        return iter(self._loaded.values())

    def __len__(self) -> int:
        return len(self._loaded)

    def names(self) -> tuple[str, ...]:
        """The names that can be asked for, in the order of the files."""
        return tuple(self._loaded)

    def loaded(self) -> tuple[LoadedGraph, ...]:
        """The graphs that are served, in the order of the files."""
        return tuple(self._loaded.values())

    def get(self, name: str) -> LoadedGraph:
        """The graph of this name, or `UnknownGraph`."""
        try:
            return self._loaded[name]
        except KeyError:
            raise UnknownGraph(name, self.names()) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedGraph:
    """A graph that has been built at least once, and so can be described and run."""

    name: str
    #: For people: the attribute, and the file that names it.
    source: str
    description: str | None
    #: What a run without an input starts from: `sereno.default_input` of its langgraph.json.
    default_input: dict[str, Any] | None
    #: Changes when nodes, edges or channels do, subgraphs included.
    digest: str
    #: Without LangGraph's hidden ones.
    nodes: tuple[str, ...]
    interrupt_before: tuple[str, ...]
    interrupt_after: tuple[str, ...]
    #: The graph as it was built at start, to look at. To run one, `open` it.
    graph: Graph = field(repr=False)
    #: Set when each run gets a graph of its own.
    factory: Factory | None = field(repr=False)
    #: What a graph of its own goes through before it runs.
    wrap: Wrap = field(default=_as_it_is, repr=False, compare=False)
    #: What `schema` has worked out.
    _schema: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    #: What others work out about it once and keep for as long as it is served.
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @asynccontextmanager
    async def open(self, config: RunnableConfig) -> AsyncIterator[Graph]:
        """The graph to run with this config: the one built at start, or one made for this run.

        It has no checkpointer of its own: hand ours over in `config`.
        """
        if self.factory is None:
            yield self.graph
            return
        async with AsyncExitStack() as held:
            with _blaming(self.name, self.source):
                made = _without_checkpointer(await _enter(self.factory(config), held))
            yield self.wrap(made)

    def node_paths(self) -> tuple[str, ...]:
        """The nodes and those of subgraphs, as telemetry calls them: names joined by `/`."""
        paths = list(self.nodes)
        for namespace, graph in self.graph.get_subgraphs(recurse=True):
            inner = namespace.split("|")
            nodes = getattr(graph, "nodes", ())  # a remote graph has none here
            paths += ["/".join((*inner, node)) for node in nodes if node != START]
        return tuple(paths)

    def schema(self) -> dict[str, Any]:
        """The JSON Schemas of its input, output and context (None: it takes none).

        A type that has no JSON Schema is `{}`, which says "anything".
        """
        if not self._schema:
            builder = getattr(self.graph, "builder", None)
            context = self.graph.context_schema
            self._schema["input"] = _json_schema(
                self.graph.get_input_jsonschema, getattr(builder, "input_schema", None)
            )
            self._schema["output"] = _json_schema(
                self.graph.get_output_jsonschema, getattr(builder, "output_schema", None)
            )
            self._schema["context"] = context and _json_schema(
                self.graph.get_context_jsonschema, context
            )
        return dict(self._schema)


def _json_schema(ask: Callable[[], dict[str, Any] | None], kind: Any) -> dict[str, Any]:
    try:
        return ask() or {}
    except Exception:
        pass
    # Before Python 3.12 pydantic refuses typing.TypedDict, in which most states are written.
    try:
        required: frozenset[str] = kind.__required_keys__
        fields = {
            key: hint if key in required else typing.NotRequired[hint]
            for key, hint in typing.get_type_hints(kind).items()
        }
        accepted: Any = TypedDict
        return TypeAdapter(accepted(kind.__name__, fields)).json_schema()
    except Exception:
        return {}


# Sources: what is asked for, before anything of it is imported.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    name: str
    #: `./path.py:attr` or `package.module:attr`, as written.
    target: str
    #: The file or the argument that it is written in.
    given_by: str
    description: str | None = None
    default_input: dict[str, Any] | None = None
    project: Project
    environment: _Environment

    @property
    def source(self) -> str:
        return self.target if self.target == self.given_by else f"{self.target} in {self.given_by}"


def _read_sources(sources: Sequence[str | Path]) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    projects: _Projects = {}
    for source in sources:
        inline = re.fullmatch(r"(?:([^=/]+)=)?([^=]+:(\w+))", str(source))
        if inline and isinstance(source, str):
            found = _read_inline(inline[1] or inline[3], inline[2], projects)
        else:
            found = _read_config(Path(source), projects)
        for entry in found:
            _check_name(entry)
            if (first := entries.setdefault(entry.name, entry)) is not entry:
                raise GraphLoadFailed(
                    f"graph {entry.name!r} is given twice: "
                    f"by {first.given_by} and by {entry.given_by}"
                )
    return list(entries.values())


def _check_name(entry: _Entry) -> None:
    """A name is a part of addresses, an argument and a label: it must come through whole."""
    name = entry.name
    fits = (
        0 < len(name) <= LONGEST_NAME
        and name.isprintable()
        and name == name.strip()
        and not set(name) & set("/\\")
        and name not in (".", "..")
    )
    if not fits:
        raise GraphLoadFailed(
            f"{entry.given_by}: no graph can be called {name[: LONGEST_NAME + 1]!r}: give it a "
            f"name of 1 to {LONGEST_NAME} visible characters, spaces between them, without / and \\"
        )


#: By folder and import paths: two files of one folder share their modules.
_Projects: TypeAlias = dict[tuple[Path, tuple[str, ...]], Project]


def _read_inline(name: str, target: str, projects: _Projects) -> list[_Entry]:
    here = Path.cwd()
    file = _file_of(target, here)
    paths = _import_paths([file.parent, here] if file else [here])
    project = projects.setdefault((here, paths), Project(name, here, paths))
    environment = _Environment()
    return [
        _Entry(name=name, target=target, given_by=target, project=project, environment=environment)
    ]


def _read_config(source: Path, projects: _Projects) -> list[_Entry]:
    path = source.expanduser().resolve()
    path = path / "langgraph.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text("utf-8"))
        # NaN and half characters can be read, but never be told in an answer.
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()
        graphs = {name: _target(name, entry) for name, entry in config["graphs"].items()}
        defaults = _default_inputs(config.get("sereno") or {})
    except KeyError:
        raise GraphLoadFailed(f"{path} has no 'graphs'") from None
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise GraphLoadFailed(f"{path} is not a langgraph.json: {_cause(exc)}") from exc
    if not graphs:
        raise GraphLoadFailed(f"{path} has no 'graphs'")
    if unknown := set(defaults) - set(graphs):
        raise GraphLoadFailed(f"{path}: 'default_input' of unknown graphs: {sorted(unknown)}")
    # What is no folder is a pip requirement, which must be installed already.
    dependencies = [path.parent / str(entry) for entry in config.get("dependencies") or ()]
    paths = _import_paths([path.parent, *dependencies])
    # The key goes into module names, and these into checkpoints: it must not depend on where the
    # project lies, nor on what is added to it later.
    fresh = Project(next(iter(graphs)), path.parent, paths)
    project = projects.setdefault((path.parent, paths), fresh)
    environment = _read_environment(config.get("env"), path)
    return [
        _Entry(
            name=name,
            target=target,
            given_by=str(path),
            description=description,
            default_input=defaults.get(name),
            project=project,
            environment=environment,
        )
        for name, (target, description) in graphs.items()
    ]


def _target(name: str, entry: Any) -> tuple[str, str | None]:
    target, description = (
        (entry["path"], entry.get("description")) if isinstance(entry, dict) else (entry, None)
    )
    if not isinstance(target, str) or not re.fullmatch(r".+:\w+", target):
        raise ValueError(f"{target!r} is not './path.py:variable' or 'module:variable'")
    if not isinstance(description, str | None):
        raise ValueError(
            f"'description' of graph {name!r} is {description!r}: write a text, or leave it out"
        )
    return target, description


def _default_inputs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    defaults = config.get("default_input", {})
    if not isinstance(defaults, dict):
        raise ValueError(
            f"'default_input' is {defaults!r}: write an object, from a graph's name to its input"
        )
    for name, given in defaults.items():
        if not isinstance(given, dict | None):
            raise ValueError(
                f"'default_input' of graph {name!r} is {given!r}: write an object, or leave it out"
            )
    return defaults


def _file_of(target: str, folder: Path) -> Path | None:
    """The file that a target names, or None if it names a module."""
    place = target.rpartition(":")[0]
    is_file = "/" in place or place.endswith(".py")
    return (folder / place).resolve() if is_file else None


def _import_paths(folders: Sequence[Path]) -> tuple[str, ...]:
    """The folders, each followed by its `src`, unless `src` is a package itself."""
    paths: list[Path] = []
    for folder in folders:
        src = folder / "src"
        paths += [folder] if (src / "__init__.py").exists() else [folder, src]
    return tuple(dict.fromkeys(str(path.resolve()) for path in paths if path.is_dir()))


def _read_environment(env: Any, config: Path) -> _Environment:
    if not isinstance(env, str):
        values = env if isinstance(env, Mapping) else {}
    elif (file := config.parent / env).is_file():
        values = dotenv_values(file, encoding="utf-8")
    else:
        # `langgraph dev` starts without it too: templates name an .env that a clone has not got.
        log.warning("env file missing", file=str(file))
        values = {}
    return _Environment(tuple((k, str(v)) for k, v in values.items() if v is not None))


@dataclass(frozen=True, slots=True)
class _Environment:
    values: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Sets what is not set yet, and takes it back at the end."""
        added = {key: value for key, value in self.values if key not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for key in added:
                os.environ.pop(key, None)


# Loading: from an entry to a graph.


async def _load(entry: _Entry, held: AsyncExitStack, wrap: Wrap) -> LoadedGraph:
    """Builds one graph; what it has opened is closed by `held`, or at once if it fails."""
    async with AsyncExitStack() as opened:
        with _blaming(entry.name, entry.source):
            # In a thread: a module may call asyncio.run() while it is imported.
            found = await asyncio.to_thread(_attribute, entry)
            factory = _factory(found)
            if factory is None:
                made = found() if _is_callable(found) else found
                graph = await _enter(made, opened)
            else:
                async with AsyncExitStack() as trial:
                    graph = await _enter(factory({"configurable": {}}), trial)
            loaded = _describe(entry, graph, factory, wrap)
        held.push_async_exit(opened.pop_all())
    return loaded


@contextmanager
def _blaming(name: str, source: str) -> Iterator[None]:
    try:
        yield
    except GraphLoadFailed:
        raise
    except (Exception, SystemExit) as exc:
        raise GraphLoadFailed(f"graph {name!r} ({source}) did not load: {_cause(exc)}") from exc


def _cause(exc: BaseException) -> str:
    """What happened, and where in the user's code."""
    cause = f"{type(exc).__name__}: {exc}"
    frames = traceback.extract_tb(exc.__traceback__)
    ours = (str(Path(__file__).parent), "<frozen ")
    if frames and not frames[-1].filename.startswith(ours):
        cause += f" ({frames[-1].filename}:{frames[-1].lineno})"
    if isinstance(exc, ModuleNotFoundError):
        cause += "; install what the graph needs beside Sereno: .venv/bin/pip install ..."
    return cause


def _attribute(entry: _Entry) -> Any:
    place, _, attribute = entry.target.rpartition(":")
    file = _file_of(entry.target, entry.project.folder)
    # Here and not only in the caller: a thread cannot hand over every exception as it is.
    with _blaming(entry.name, entry.source):
        module = entry.project.load_file(file) if file else entry.project.load_module(place)
        if not hasattr(module, attribute):
            raise AttributeError(f"{place} has no attribute {attribute!r}")
        return getattr(module, attribute)


def _factory(found: Any) -> Factory | None:
    """`found` itself if it makes a graph from a run's config; LangGraph's rule: by its arity."""
    if not _is_callable(found):
        return None
    takes = [
        parameter
        for parameter in inspect.signature(found).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    required = [parameter for parameter in takes if parameter.default is parameter.empty]
    if len(required) > 1:
        raise TypeError(
            f"the factory takes {len(required)} arguments; it may take none, or the run's config"
        )
    return cast(Factory, found) if required or len(takes) == 1 else None


def _is_callable(found: Any) -> bool:
    return callable(found) and not isinstance(found, Pregel | StateGraph)


async def _enter(made: Any, held: AsyncExitStack) -> Graph:
    """The graph in what a factory gave: a graph, or something to await, enter or compile."""
    if inspect.isawaitable(made):
        made = await made
    if isinstance(made, AbstractAsyncContextManager):
        made = await held.enter_async_context(made)
    elif isinstance(made, AbstractContextManager):
        made = held.enter_context(made)
    if isinstance(made, StateGraph):
        made = made.compile()
    if not isinstance(made, Pregel):
        raise TypeError(f"a {type(made).__name__} is not a graph")
    return made


def _describe(entry: _Entry, graph: Graph, factory: Factory | None, wrap: Wrap) -> LoadedGraph:
    if graph.checkpointer is not None:
        log.info("own checkpointer replaced", graph=entry.name)
    return LoadedGraph(
        name=entry.name,
        source=entry.source,
        description=entry.description,
        default_input=entry.default_input,
        digest=digest(json.dumps(_shape(graph), sort_keys=True)),
        nodes=_visible(graph),
        interrupt_before=_stops(graph, graph.interrupt_before_nodes),
        interrupt_after=_stops(graph, graph.interrupt_after_nodes),
        graph=wrap(_without_checkpointer(graph)),
        factory=factory,
        wrap=wrap,
    )


def _without_checkpointer(graph: Graph) -> Graph:
    """The graph, or a copy of it that leaves the choice of the checkpointer to the config.

    In Pregel, a saver in the config wins over the graph's own; but over `False` ("none at all")
    it does not, and a graph's own is what a call without our config would silently write to.
    `copy.copy`, because `Pregel.copy` forgets which types of the state may be read back.
    """
    if graph.checkpointer is None:
        return graph
    ours = copy.copy(graph)
    ours.checkpointer = None
    return ours


def _visible(graph: Graph) -> tuple[str, ...]:
    return tuple(name for name, node in graph.nodes.items() if TAG_HIDDEN not in (node.tags or ()))


def _stops(graph: Graph, at: Sequence[str] | str) -> tuple[str, ...]:
    return _visible(graph) if at == "*" else tuple(at)


def _shape(graph: Graph, above: tuple[Graph, ...] = ()) -> dict[str, Any]:
    """What recovery depends on, as JSON. A graph that calls itself is described once."""
    above = (*above, graph)
    return {
        "nodes": sorted(graph.nodes),
        "edges": sorted(_edges(graph)),
        "channels": sorted(graph.channels),
        "subgraphs": {
            name: _shape(sub, above)
            for name, sub in graph.get_subgraphs()
            if isinstance(sub, Pregel) and not any(sub is other for other in above)
        },
    }


def _edges(graph: Graph) -> Iterator[tuple[str, str]]:
    builder = getattr(graph, "builder", None)
    if not isinstance(builder, StateGraph):
        for name, node in graph.nodes.items():
            yield from ((trigger, name) for trigger in node.triggers)
        return
    yield from builder.edges
    yield from (("+".join(sorted(starts)), end) for starts, end in builder.waiting_edges)
    for start, branches in builder.branches.items():
        for branch in branches.values():
            # Without a path map it may go anywhere.
            yield from ((start, end) for end in (branch.ends or {"*": "*"}).values())
    for name, spec in builder.nodes.items():
        yield from ((name, end) for end in spec.ends or ())
