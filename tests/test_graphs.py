"""What can be given as a graph, what comes of it, and what is said when nothing does."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.pregel import Pregel
from structlog.testing import capture_logs

import runtime
from runtime.errors import GraphLoadFailed, UnknownGraph
from runtime.graphs import Graphs, LoadedGraph

PROJECTS = Path(__file__).parent / "graphs"

#: A module with every kind of attribute that can stand for a graph.
MODULE = """
import contextlib, functools
from dataclasses import dataclass
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import StateGraph, START
from typing_extensions import TypedDict

calls = []

class State(TypedDict, total=False):
    x: int

def one(state: State) -> State:
    return {"x": state.get("x", 0) + 1}

builder = StateGraph(State).add_node(one).add_edge(START, "one")
graph = builder.compile()
saved = builder.compile(checkpointer=InMemorySaver())
unsaved = builder.compile(checkpointer=False)

@entrypoint()
async def flow(x: dict) -> dict:
    return {"x": x.get("x", 0) + 1}

def make():
    calls.append("make")
    return graph

def make_builder():
    return builder

async def amake():
    return graph

@contextlib.contextmanager
def hold():
    calls.append("open")
    yield graph
    calls.append("close")

@contextlib.asynccontextmanager
async def ahold():
    calls.append("open")
    yield builder
    calls.append("close")

async def amake_hold():
    return hold()

def per_run(config):
    calls.append(dict(config["configurable"]))
    return builder.compile(checkpointer=InMemorySaver())

async def aper_run(settings: RunnableConfig):
    return builder

@contextlib.contextmanager
def hold_per_run(config=None):
    calls.append("open")
    yield graph
    calls.append("close")

@contextlib.asynccontextmanager
async def ahold_per_run(config):
    calls.append("open")
    try:
        yield graph
    finally:
        calls.append("close")

partial = functools.partial(per_run, {"configurable": {}})

number = 7
def broken(): raise KeyError("no key")
def broken_per_run(config):
    if config["configurable"]:
        raise KeyError("no key")
    return graph
def greedy(a, b): ...
def wrong(): return {"not": "a graph"}
"""

BUILT = ["graph", "saved", "unsaved", "builder", "flow", "make", "make_builder", "amake"]
HELD = ["hold", "ahold", "amake_hold"]
PER_RUN = ["per_run", "aper_run", "hold_per_run", "ahold_per_run"]


def write(folder: Path, files: dict[str, str | dict[str, Any]]) -> Path:
    """A project on disk; a dict becomes JSON. Gives the path of its langgraph.json."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "langgraph.json"


def project(folder: Path, attribute: str, **config: Any) -> Path:
    """A project of one graph, `g`, which is this attribute of MODULE."""
    graphs = {"graphs": {"g": f"./app.py:{attribute}"}, "dependencies": ["."]}
    return write(folder, {"app.py": MODULE, "langgraph.json": {**graphs, **config}})


def calls(loaded: LoadedGraph) -> list[Any]:
    """What the factories of the module that this graph comes from have noted."""
    node: Any = loaded.graph.nodes["one"].bound
    noted: list[Any] = node.func.__globals__["calls"]
    return noted


async def run(loaded: LoadedGraph, given: Any) -> Any:
    async with loaded.open({"configurable": {}}) as graph:
        return await graph.ainvoke(given)


@pytest.mark.parametrize("attribute", [*BUILT, *HELD, *PER_RUN, "partial"])
async def test_every_kind_of_attribute_gives_a_graph_that_runs(
    tmp_path: Path, attribute: str
) -> None:
    async with Graphs([project(tmp_path, attribute)]) as graphs:
        loaded = graphs.get("g")

        assert isinstance(loaded.graph, Pregel)
        assert await run(loaded, {"x": 1}) == {"x": 2}


@pytest.mark.parametrize("attribute", HELD)
async def test_a_context_manager_is_entered_once_and_held_until_the_end(
    tmp_path: Path, attribute: str
) -> None:
    async with Graphs([project(tmp_path, attribute)]) as graphs:
        noted = calls(graphs.get("g"))
        await run(graphs.get("g"), {})
        await run(graphs.get("g"), {})

        assert noted == ["open"]
    assert noted == ["open", "close"]


async def test_a_factory_without_arguments_is_called_once(tmp_path: Path) -> None:
    async with Graphs([project(tmp_path, "make")]) as graphs:
        await run(graphs.get("g"), {})

        assert calls(graphs.get("g")) == ["make"]


async def test_a_factory_with_an_argument_is_called_at_start_and_for_each_run(
    tmp_path: Path,
) -> None:
    async with Graphs([project(tmp_path, "per_run")]) as graphs:
        loaded = graphs.get("g")
        async with (
            loaded.open({"configurable": {"user": "a"}}) as first,
            loaded.open({"configurable": {"user": "b"}}) as second,
        ):
            assert first is not second
            assert first.checkpointer is None

        assert calls(loaded) == [{}, {"user": "a"}, {"user": "b"}]


@pytest.mark.parametrize("attribute", ["hold_per_run", "ahold_per_run"])
async def test_what_a_run_opens_is_closed_at_its_end(tmp_path: Path, attribute: str) -> None:
    async with Graphs([project(tmp_path, attribute)]) as graphs:
        loaded = graphs.get("g")
        assert calls(loaded) == ["open", "close"]
        async with loaded.open({"configurable": {}}):
            assert calls(loaded) == ["open", "close", "open"]

        assert calls(loaded) == ["open", "close"] * 2


async def test_an_error_of_a_run_reaches_its_caller_and_closes_what_was_opened(
    tmp_path: Path,
) -> None:
    async with Graphs([project(tmp_path, "ahold_per_run")]) as graphs:
        loaded = graphs.get("g")
        with pytest.raises(ZeroDivisionError):
            async with loaded.open({"configurable": {}}):
                raise ZeroDivisionError

        assert calls(loaded) == ["open", "close"] * 2


async def test_a_factory_that_fails_for_a_run_is_named(tmp_path: Path) -> None:
    async with Graphs([project(tmp_path, "broken_per_run")]) as graphs:
        with pytest.raises(GraphLoadFailed, match=r"app\.py:broken_per_run.*KeyError: 'no key'"):
            async with graphs.get("g").open({"configurable": {"a": 1}}):
                pass


@pytest.mark.parametrize("attribute", ["saved", "unsaved"])
async def test_a_checkpointer_of_its_own_gives_way_to_ours(tmp_path: Path, attribute: str) -> None:
    ours = InMemorySaver()
    config: Any = {"configurable": {"thread_id": "t", "__pregel_checkpointer": ours}}
    with capture_logs() as logs:
        async with Graphs([project(tmp_path, attribute)]) as graphs:
            loaded = graphs.get("g")
            async with loaded.open(config) as graph:
                await graph.ainvoke({"x": 1}, config)
            node: Any = loaded.graph.nodes["one"].bound
            theirs = node.func.__globals__[attribute]

            assert ours.get_tuple({"configurable": {"thread_id": "t", "checkpoint_ns": ""}})
            assert theirs.checkpointer is not None, "the user's object is as it was"
            assert graph.checkpointer is None
            assert graph.builder is theirs.builder
    assert [(line["event"], line["graph"]) for line in logs] == [("own checkpointer replaced", "g")]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        pytest.param("app:graph", "graph", id="module"),
        pytest.param("mine=app:graph", "mine", id="named module"),
        pytest.param("./app.py:graph", "graph", id="file"),
        pytest.param("mine=./app.py:graph", "mine", id="named file"),
        pytest.param("pkg.inner:graph", "graph", id="module in src"),
        pytest.param("langgraph.json", "g", id="config"),
        pytest.param(".", "g", id="folder of a config"),
        pytest.param(Path("langgraph.json"), "g", id="path"),
    ],
)
async def test_every_form_of_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | Path, name: str
) -> None:
    project(tmp_path, "graph")
    write(tmp_path, {"src/pkg/inner.py": "from app import graph as graph"})
    monkeypatch.chdir(tmp_path)
    async with Graphs([source]) as graphs:
        assert graphs.names() == (name,)
        assert await run(graphs.get(name), {"x": 1}) == {"x": 2}


@pytest.mark.parametrize(
    ("entry", "description"),
    [
        pytest.param("./app.py:graph", None, id="file"),
        pytest.param("./deep/er/app two.py:graph", None, id="file that is no identifier"),
        pytest.param("app:graph", None, id="module"),
        pytest.param("pkg.inner:graph", None, id="module in src"),
        pytest.param("libs.shared:graph", None, id="module in a dependency"),
        pytest.param({"path": "./app.py:graph", "description": "One."}, "One.", id="object"),
        pytest.param({"path": "./app.py:graph"}, None, id="object without description"),
    ],
)
async def test_every_form_of_entry(tmp_path: Path, entry: Any, description: str | None) -> None:
    config = project(
        tmp_path / "p",
        "graph",
        graphs={"g": entry},
        dependencies=[".", "../other", "./gone", "langchain_openai"],
        python_version="3.11",
    )
    write(
        tmp_path,
        {
            "p/src/pkg/inner.py": MODULE,
            "p/deep/er/app two.py": MODULE,
            "other/libs/shared.py": "from pkg.inner import *",
        },
    )
    async with Graphs([config]) as graphs:
        assert graphs.get("g").description == description
        assert await run(graphs.get("g"), {"x": 1}) == {"x": 2}


async def test_graphs_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    names = {"z": "./app.py:graph", "a": "./app.py:make"}
    first = project(tmp_path / "1", "", graphs=names)
    second = project(tmp_path / "2", "", graphs={"m": "./app.py:graph"})
    async with Graphs([first, str(second)]) as graphs:
        assert graphs.names() == ("z", "a", "m")
        assert [loaded.name for loaded in graphs] == ["z", "a", "m"]
        assert graphs.loaded() == tuple(graphs)
        assert len(graphs) == 3
        with pytest.raises(UnknownGraph, match="known graphs: z, a, m"):
            graphs.get("nope")


async def test_one_name_in_two_files_names_both(tmp_path: Path) -> None:
    first = project(tmp_path / "one", "graph")
    second = project(tmp_path / "two", "graph")
    with pytest.raises(GraphLoadFailed, match=r"'g' is given twice.*one.*two"):
        async with Graphs([first, second], lenient=True):
            pass


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        pytest.param("./gone.py:graph", "FileNotFoundError", id="no file"),
        pytest.param("gone.away:graph", "ModuleNotFoundError: No module named 'gone'", id="module"),
        pytest.param(
            "./app.py:gone", "AttributeError: .*app.py has no attribute 'gone'", id="attr"
        ),
        pytest.param("./app.py:number", "TypeError: a int is not a graph", id="no graph"),
        pytest.param("./app.py:wrong", "TypeError: a dict is not a graph", id="made no graph"),
        pytest.param("./app.py:broken", "KeyError: 'no key'", id="factory"),
        pytest.param("./app.py:greedy", "TypeError: the factory takes 2 arguments", id="arity"),
        pytest.param("./bad.py:graph", "ZeroDivisionError", id="module raises"),
        pytest.param("./exits.py:graph", "SystemExit: 3", id="module exits"),
        pytest.param("./stops.py:graph", "StopIteration", id="module stops an iteration"),
        pytest.param("./syntax.py:graph", "SyntaxError", id="syntax"),
    ],
)
async def test_a_graph_that_does_not_load_names_file_attribute_and_cause(
    tmp_path: Path, target: str, cause: str
) -> None:
    config = project(tmp_path, "", graphs={"bad": target, "good": "./app.py:graph"})
    write(
        tmp_path,
        {
            "bad.py": "1 / 0",
            "exits.py": "raise SystemExit(3)",
            "stops.py": "next(iter([]))",
            "syntax.py": "def",
        },
    )
    with pytest.raises(GraphLoadFailed, match=f"(?s)'bad'.*{target}.*langgraph.json.*{cause}") as e:
        async with Graphs([config]):
            pass
    assert e.value.__cause__ is not None

    with capture_logs():
        async with Graphs([config], lenient=True) as graphs:
            assert graphs.failures == {"bad": str(e.value)}
            assert graphs.names() == ("good",)
            with pytest.raises(UnknownGraph):
                graphs.get("bad")
            assert await run(graphs.get("good"), {"x": 1}) == {"x": 2}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("{", "is not a langgraph.json: JSONDecodeError", id="no JSON"),
        pytest.param("[]", "is not a langgraph.json", id="no object"),
        pytest.param("{}", "has no 'graphs'", id="no graphs"),
        pytest.param('{"graphs": {}}', "has no 'graphs'", id="empty"),
        pytest.param(
            '{"graphs": {"a": "x.py"}}', "'x.py' is not './path.py:variable'", id="target"
        ),
        pytest.param('{"graphs": {"a": 1}}', "1 is not './path.py:variable'", id="number"),
        pytest.param(
            '{"graphs": {"a": "x:y"}, "sereno": {"default_input": {"b": {}}}}',
            "unknown graphs: \\['b'\\]",
            id="default input of nothing",
        ),
        pytest.param(
            '{"graphs": {"a": {"path": "x:y", "description": 5}}}',
            "'description' of graph 'a' is 5: write a text, or leave it out",
            id="description",
        ),
        pytest.param(
            '{"graphs": {"a": "x:y"}, "sereno": {"default_input": {"a": [1]}}}',
            "'default_input' of graph 'a' is \\[1\\]: write an object, or leave it out",
            id="default input that is a list",
        ),
        pytest.param(
            '{"graphs": {"a": "x:y"}, "sereno": {"default_input": {"a": "hi"}}}',
            "'default_input' of graph 'a' is 'hi': write an object",
            id="default input that is a text",
        ),
        pytest.param(
            '{"graphs": {"a": "x:y"}, "sereno": {"default_input": []}}',
            "'default_input' is \\[\\]: write an object, from a graph's name to its input",
            id="default inputs that are a list",
        ),
        pytest.param(
            '{"graphs": {"a": "x:y"}, "sereno": {"default_input": {"a": {"x": NaN}}}}',
            "is not a langgraph.json: ValueError: .*not JSON compliant",
            id="default input that is no JSON",
        ),
        pytest.param(
            '{"graphs": {"a": {"path": "x:y", "description": "\\ud800"}}}',
            "is not a langgraph.json: UnicodeEncodeError",
            id="half a character",
        ),
        pytest.param(None, "FileNotFoundError", id="no file"),
    ],
)
async def test_a_config_that_cannot_be_read_is_named_lenient_or_not(
    tmp_path: Path, text: str | None, complaint: str
) -> None:
    config = tmp_path / "langgraph.json"
    if text is not None:
        config.write_text(text)
    with pytest.raises(GraphLoadFailed, match=f"{config}.*{complaint}"):
        async with Graphs([config], lenient=True):
            pass


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "/a", "a\\b", "a\nb", "a\x00", "a\u2028b", " a", "a ", " ", "a" * 129],
)
async def test_a_name_that_does_not_fit_into_an_address_is_refused(
    tmp_path: Path, name: str
) -> None:
    config = project(tmp_path, "", graphs={name: "./app.py:graph"})
    with pytest.raises(GraphLoadFailed) as refused:
        async with Graphs([config], lenient=True):
            pass

    assert str(config) in str(refused.value)
    assert f"can be called {name!r}: give it a name of 1 to 128" in str(refused.value)


async def test_so_is_one_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path, "graph")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraphLoadFailed, match=r"app:graph: no graph can be called '\.\.'"):
        async with Graphs(["..=app:graph"]):
            pass


@pytest.mark.parametrize(
    "name", ["a", "Deep Researcher", "a.b-c_d", "größe", "a?b#c%2F", "a" * 128]
)
async def test_names_that_fit(tmp_path: Path, name: str) -> None:
    async with Graphs([project(tmp_path, "", graphs={name: "./app.py:graph"})]) as graphs:
        assert graphs.names() == (name,)


async def test_a_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    config = project(
        tmp_path,
        "",
        graphs={"held": "./app.py:hold", "bad": "./app.py:broken"},
        env={"SERENO_TEST_LEFT": "x"},
    )
    before = set(sys.modules), list(sys.meta_path), list(sys.path)
    with pytest.raises(GraphLoadFailed):
        async with Graphs([config]):
            pass

    assert "SERENO_TEST_LEFT" not in os.environ
    assert {name for name in sys.modules if name.startswith(("sereno_", "app"))} <= before[0]
    assert (sys.meta_path, sys.path) == before[1:]


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"SERENO_TEST_A": "a b", "SERENO_TEST_B": 2, "SERENO_TEST_C": "c"}, id="map"),
        pytest.param("config/.env", id="file"),
    ],
)
async def test_the_environment_is_set_but_what_exists_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: Any
) -> None:
    monkeypatch.setenv("SERENO_TEST_C", "mine")
    text = (
        "# c\n\nexport SERENO_TEST_A='a b'\nSERENO_TEST_B=2 # two\nSERENO_TEST_C=c\nSERENO_TEST_D\n"
    )
    module = (
        "import os\nassert os.environ['SERENO_TEST_A'] == 'a b'\nfrom app import graph as graph"
    )
    config = project(tmp_path, "", env=env, graphs={"g": "./reads.py:graph"})
    write(tmp_path, {"config/.env": text, "reads.py": module})
    async with Graphs([config]):
        assert os.environ["SERENO_TEST_A"] == "a b"
        assert os.environ["SERENO_TEST_B"] == "2"
        assert os.environ["SERENO_TEST_C"] == "mine"
        assert "SERENO_TEST_D" not in os.environ
    assert "SERENO_TEST_A" not in os.environ
    assert os.environ["SERENO_TEST_C"] == "mine"


async def test_an_env_file_that_is_missing_is_logged_and_no_more(tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with Graphs([project(tmp_path, "graph", env=".env")]) as graphs:
            assert graphs.names() == ("g",)
    assert [(line["event"], line["file"]) for line in logs] == [
        ("env file missing", str(tmp_path / ".env"))
    ]


async def test_a_project_with_a_package_called_runtime_is_served_as_it_is() -> None:
    ours = sys.modules["runtime"]
    async with Graphs([PROJECTS / "own_runtime"]) as graphs:
        agent = graphs.get("agent")
        state = await run(agent, agent.default_input)

        assert agent.description == "Greets with a package called runtime, its own."
        assert state["greeting"].text == "Good day, Ada!"
        assert state["tools"] == [
            "The project's own runtime.",
            "GOOD DAY PLAIN",
            "GOOD DAY FROM",
            "Good day, named!",
            "Good day, taken!",
        ]
        assert type(state["greeting"]).__module__ == "agent.state"
        assert sys.modules["runtime"] is ours is runtime
        assert importlib.import_module("runtime.errors").GraphLoadFailed is GraphLoadFailed
    assert not [name for name in sys.modules if name.startswith(("sereno_", "agent"))]


@pytest.mark.parametrize("name", ["runtime", "telemetry"])
async def test_our_names_mean_the_projects_modules_in_every_form(tmp_path: Path, name: str) -> None:
    module = f"from {name}.a.b import WHO\nimport {name}.a.b as x\n" + MODULE
    module += f"import {name}\nassert (WHO, x.WHO, {name}.a.b.WHO) == ('me',) * 3\n"
    config = project(tmp_path, "graph")
    write(tmp_path, {"app.py": module, f"{name}/a/b.py": f"import {name}.a\nWHO = 'me'"})
    async with Graphs([config]) as graphs:
        assert graphs.names() == ("g",)


async def test_a_project_without_a_package_called_runtime_can_import_ours(tmp_path: Path) -> None:
    config = project(tmp_path, "graph")
    write(tmp_path, {"app.py": "from runtime.errors import SerenoError\n" + MODULE})
    async with Graphs([config]) as graphs:
        node: Any = graphs.get("g").graph.nodes["one"].bound

        assert issubclass(GraphLoadFailed, node.func.__globals__["SerenoError"])


async def test_a_project_around_sereno_itself_imports_ours(tmp_path: Path) -> None:
    checkout = Path(runtime.__file__ or "").parents[1]
    config = project(tmp_path, "graph", dependencies=[".", str(checkout)])
    write(tmp_path, {"app.py": "from runtime.errors import SerenoError\n" + MODULE})
    async with Graphs([config]) as graphs:
        node: Any = graphs.get("g").graph.nodes["one"].bound

        assert issubclass(GraphLoadFailed, node.func.__globals__["SerenoError"])


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
async def test_two_projects_with_one_package_name_do_not_meet(order: tuple[str, str]) -> None:
    async with Graphs([PROJECTS / "twins" / name for name in order]) as graphs:
        for name in order:
            assert await run(graphs.get(name), {}) == {"names": [name, name]}

        assert importlib.import_module("agent.late").NAME == order[0]


async def test_a_project_in_the_working_directory_is_not_taken_for_an_installed_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(PROJECTS / "twins" / "second" / "src")
    async with Graphs([PROJECTS / "twins" / name for name in ("first", "second")]) as graphs:
        for name in graphs.names():
            assert await run(graphs.get(name), {}) == {"names": [name, name]}


async def test_installed_packages_and_the_standard_library_are_not_shadowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    configs = []
    for name in ("one", "two"):
        graphs = {name: "./langgraph.py:graph"}
        configs.append(project(tmp_path / name, "", graphs=graphs))
        files = dict.fromkeys(["json.py", "colorsys.py", "typing_extensions.py"], "1 / 0")
        module = "import colorsys, json\n" + MODULE
        write(tmp_path / name, {"langgraph.py": module, **files})
    async with Graphs(configs) as graphs:
        assert await run(graphs.get("one"), {"x": 1}) == {"x": 2}
        assert await run(graphs.get("two"), {"x": 1}) == {"x": 2}


async def test_two_graphs_of_one_file_share_its_module(tmp_path: Path) -> None:
    config = project(tmp_path, "", graphs={"a": "./app.py:graph", "b": "./app.py:make"})
    async with Graphs([config]) as graphs:
        assert graphs.get("a").graph is graphs.get("b").graph


async def test_a_module_that_runs_a_loop_while_it_is_imported_loads(tmp_path: Path) -> None:
    module = MODULE + "\nimport asyncio\nran = asyncio.run(amake())\n"
    config = project(tmp_path, "ran")
    write(tmp_path, {"app.py": module})
    async with Graphs([config]) as graphs:
        assert graphs.names() == ("g",)


async def test_a_module_name_does_not_depend_on_where_the_project_lies(tmp_path: Path) -> None:
    names = []
    for place in ("here", "there"):
        async with Graphs([project(tmp_path / place, "graph")]) as graphs:
            node: Any = graphs.get("g").graph.nodes["one"].bound
            names.append(node.func.__module__)
    assert names[0] == names[1]


async def test_a_graph_describes_itself(tmp_path: Path) -> None:
    config = project(tmp_path, "described", sereno={"default_input": {"g": {"x": 4}}})
    module = MODULE + (
        "\n@dataclass\nclass Context:\n    user: str\n"
        "described = StateGraph(State, context_schema=Context).add_node(one).add_node('two', graph)"
        ".add_edge(START, 'one').add_edge('one', 'two')"
        ".compile(interrupt_before=['two'], interrupt_after='*')\n"
    )
    write(tmp_path, {"app.py": module})
    async with Graphs([config]) as graphs:
        loaded = graphs.get("g")
        schema = loaded.schema()

        assert loaded.nodes == ("one", "two")
        assert loaded.interrupt_before == ("two",)
        assert loaded.interrupt_after == ("one", "two")
        assert loaded.default_input == {"x": 4}
        assert loaded.source == f"./app.py:described in {config}"
        assert schema["input"]["properties"]["x"]["type"] == "integer"
        assert schema["output"]["properties"]["x"]["type"] == "integer"
        assert schema["context"]["required"] == ["user"]


@pytest.mark.parametrize(
    ("state", "required"),
    [
        pytest.param("class S(typing.TypedDict):\n  x: int\n  y: typing.NotRequired[int]", ["x"]),
        pytest.param("class S(typing.TypedDict, total=False):\n  x: int", None),
        pytest.param("class S(pydantic.BaseModel):\n  x: int\n  y: int = 1", ["x"]),
        pytest.param("@dataclasses.dataclass\nclass S:\n  x: int", ["x"]),
    ],
)
async def test_the_schema_of_every_kind_of_state(
    tmp_path: Path, state: str, required: list[str] | None
) -> None:
    module = (
        "import dataclasses, pydantic, typing\nfrom langgraph.graph import StateGraph, START\n"
        + state
        + "\ng = StateGraph(S).add_node('one', lambda s: {}).add_edge(START, 'one')\n"
    )
    config = project(tmp_path, "g")
    write(tmp_path, {"app.py": module})
    async with Graphs([config]) as graphs:
        schema = graphs.get("g").schema()

        assert schema["input"]["properties"]["x"]["type"] == "integer"
        assert schema["input"].get("required") == required
        assert schema["context"] is None


async def test_a_type_without_a_schema_accepts_anything(tmp_path: Path) -> None:
    module = MODULE.replace("x: int", "x: int\n    o: contextlib.ExitStack")
    config = project(tmp_path, "graph")
    write(tmp_path, {"app.py": module})
    async with Graphs([config]) as graphs:
        assert graphs.get("g").schema() == {"input": {}, "output": {}, "context": None}


SHAPES = """
from langgraph.graph import StateGraph, START, END
from typing_extensions import TypedDict
class S(TypedDict, total=False):
    x: int
class T(S, total=False):
    y: int
def b(kind=S):
    return StateGraph(kind).add_node("a", lambda s: {}).add_node("b", lambda s: {})
same1 = b().add_edge(START, "a").add_edge("a", "b").compile()
same2 = b().add_edge(START, "a").add_edge("a", "b").compile(name="other")
node = b().add_node("c", lambda s: {}).add_edge(START, "a").add_edge("a", "b").compile()
edge = b().add_edge(START, "a").add_edge(START, "b").compile()
channel = b(T).add_edge(START, "a").add_edge("a", "b").compile()
branch = b().add_edge(START, "a").add_conditional_edges("a", lambda s: "b", ["b", END]).compile()
free = b().add_edge(START, "a").add_conditional_edges("a", lambda s: "b").compile()
join = b().add_edge(START, "a").add_edge(START, "b").add_edge(["a", "b"], END).compile()
def parent(sub):
    return StateGraph(S).add_node("sub", sub).add_edge(START, "sub").compile()
sub1 = parent(same1)
sub2 = parent(edge)
def again(state):
    return loop.invoke(state)
loop = StateGraph(S).add_node(again).add_edge(START, "again").compile()
"""


async def test_the_digest_tells_graphs_apart_by_their_shape_alone(tmp_path: Path) -> None:
    names = "same1 same2 node edge channel branch free join sub1 sub2 loop".split()
    config = project(tmp_path, "", graphs={name: f"./shapes.py:{name}" for name in names})
    write(tmp_path, {"shapes.py": SHAPES})
    async with Graphs([config]) as graphs:
        digests = {loaded.name: loaded.digest for loaded in graphs}

        assert digests.pop("same1") == digests["same2"]
        assert len(set(digests.values())) == len(digests)
        assert all(len(digest) == 16 for digest in digests.values())
