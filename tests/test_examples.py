"""The examples are plain LangGraph projects: they run without a server, and are served as is."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from example_kit import EXAMPLES, load
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from runtime.graphs import Graphs


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLES_PACE", "0")


def thread(name: str = "t-1") -> Any:
    return {"configurable": {"thread_id": name}}


class TestServed:
    async def test_both_are_loaded_side_by_side(self) -> None:
        """Each has a `graph.py` and a `pace.py` of its own."""
        async with Graphs([EXAMPLES / "screening", EXAMPLES / "research"]) as graphs:
            loaded = graphs.loaded()

            assert graphs.names() == ("screening", "research")
            assert all(graph.default_input and graph.description for graph in loaded)
            assert all(set(graph.default_input or {}) <= input_fields(graph) for graph in loaded)

    @pytest.mark.parametrize("given", [{}, None], ids=["empty input", "default input"])
    async def test_the_screening_runs_with(self, given: dict[str, Any] | None) -> None:
        async with Graphs([EXAMPLES / "screening"]) as graphs:
            loaded = graphs.get("screening")
            async with loaded.open({}) as graph:
                final = await graph.ainvoke(loaded.default_input if given is None else given)

        assert final["job"] == "backend-engineer"
        assert len(final["notifications"]) == 6


def input_fields(graph: Any) -> set[str]:
    return set(graph.schema()["input"]["properties"])


class TestScreening:
    @pytest.fixture
    def example(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
        yield from load("screening", monkeypatch)

    @pytest.fixture
    def office(self, example: ModuleType) -> Iterator[Any]:
        with example.flaky_office() as office:
            yield office

    async def test_the_best_are_interviewed_and_everybody_is_written_to(
        self, example: ModuleType
    ) -> None:
        async with example.graph() as graph:
            final = await graph.ainvoke({"job": "backend-engineer"})

        assert final["shortlist"] == ["ana-ruiz", "carmen-ortega", "elena-prat"]
        assert final["interviews"] == {
            "ana-ruiz": "lunes a las 10:00",
            "carmen-ortega": "lunes a las 12:00",
            "elena-prat": "martes a las 10:00",
        }
        assert [sent["candidate"] for sent in final["notifications"]] == list(final["scores"])
        assert "lunes a las 10:00" in final["notifications"][0]["text"]
        assert "otras candidaturas" in final["notifications"][1]["text"]

    async def test_each_visit_of_score_takes_one_candidate(self, example: ModuleType) -> None:
        async with example.graph() as graph:
            parts = [part async for part in graph.astream({}, stream_mode=["updates", "custom"])]

        scored = [len(data["score"]["scores"]) for mode, data in parts if "score" in data]
        progress = [data for mode, data in parts if mode == "custom" and "done" in data]
        assert scored == [1, 2, 3, 4, 5, 6]
        assert progress[0] == {"message": "Ana Ruiz: 93 puntos (1 de 6)", "done": 1, "total": 6}
        assert len(progress) == 6

    async def test_every_booking_is_asked_for_twice_and_the_first_mail_too(
        self, example: ModuleType, office: Any
    ) -> None:
        async with example.screening(office.url) as builder:
            final = await builder.compile(checkpointer=InMemorySaver()).ainvoke({}, thread())

        asked = {path.split("/", 2)[2]: count for path, count in office.requests.items()}
        bookings = {f"interviews/{candidate}": 2 for candidate in final["shortlist"]}
        first, *others = (f"mails/{sent['candidate']}" for sent in final["notifications"])
        assert asked == bookings | {first: 2} | dict.fromkeys(others, 1)

    async def test_a_second_run_on_the_thread_books_anew(
        self, example: ModuleType, office: Any
    ) -> None:
        async with example.screening(office.url) as builder:
            graph = builder.compile(checkpointer=InMemorySaver())
            first = await graph.ainvoke({}, thread())
            requests = office.requests.total()
            second = await graph.ainvoke({}, thread())

        assert second["interviews"] == first["interviews"]
        assert office.requests.total() == 2 * requests

    async def test_an_unknown_job_names_the_known_ones(self, example: ModuleType) -> None:
        async with example.graph() as graph:
            with pytest.raises(ValueError, match=r"'\.\./x'; there is: backend-engineer"):
                await graph.ainvoke({"job": "../x"})


class TestResearch:
    QUESTION = "¿Cómo sobrevive un agente a los fallos y pide permiso?"

    @pytest.fixture
    def example(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
        yield from load("research", monkeypatch)

    @pytest.fixture
    def graph(self, example: ModuleType) -> Any:
        return example.builder.compile(checkpointer=InMemorySaver())

    async def test_it_waits_for_a_person_and_then_publishes(self, graph: Any) -> None:
        asked = await graph.ainvoke({"question": self.QUESTION}, thread())
        (waiting,) = asked["__interrupt__"]
        final = await graph.ainvoke(Command(resume={"approve": True}), thread())

        assert waiting.value["draft"] == asked["draft"]
        assert asked["published"] is None
        assert final["published"] == {"title": self.QUESTION, "text": asked["draft"]}
        assert "## Aprobación humana\nSe pide permiso justo antes" in asked["draft"]

    @pytest.mark.parametrize(
        ("question", "topics"),
        [
            pytest.param(QUESTION, {"retries", "durability", "approval"}, id="named"),
            pytest.param(
                "¿Qué hora es?",
                {"retries", "durability", "streaming", "observability", "approval"},
                id="all",
            ),
        ],
    )
    async def test_every_topic_is_investigated(
        self, graph: Any, question: str, topics: set[str]
    ) -> None:
        final = await graph.ainvoke({"question": question}, thread())

        assert set(final["topics"]) == topics
        assert set(final["findings"]) == topics
        assert sorted(final["ranking"]) == sorted(topics)

    async def test_the_sources_come_at_the_third_attempt(
        self, example: ModuleType, monkeypatch: pytest.MonkeyPatch, graph: Any
    ) -> None:
        await graph.ainvoke({}, thread())
        monkeypatch.setattr(example, "FAULTS", 3)

        with pytest.raises(ConnectionError):
            await graph.ainvoke({}, thread("t-2"))

    async def test_the_words_of_each_summary_are_streamed(self, graph: Any) -> None:
        words: dict[str, str] = {}
        async for _, (chunk, about) in graph.astream(
            {"question": self.QUESTION}, thread(), stream_mode="messages", subgraphs=True
        ):
            key = f"{about['langgraph_node']} {chunk.id}"
            words[key] = words.get(key, "") + chunk.text
        state = (await graph.aget_state(thread())).values

        written = {finding["summary"] for finding in state["findings"].values()}
        assert {text for key, text in words.items() if key.startswith("summarise")} == written
        assert [text for key, text in words.items() if key.startswith("write")] == [state["draft"]]

    async def test_a_text_is_a_wish_for_the_next_draft(self, graph: Any) -> None:
        await graph.ainvoke({}, thread())
        asked = await graph.ainvoke(Command(resume="Más ejemplos"), thread())
        final = await graph.ainvoke(Command(resume="sí"), thread())

        assert asked["__interrupt__"][0].value["draft"].endswith("## Revisión\n- Más ejemplos")
        assert final["published"]["text"] == asked["draft"]

    async def test_a_no_ends_without_a_publication(self, graph: Any) -> None:
        await graph.ainvoke({}, thread())
        final = await graph.ainvoke(Command(resume={"approve": False}), thread())

        assert final["published"] is None
        assert "__interrupt__" not in final

    async def test_an_answer_that_means_nothing_is_asked_for_again(self, graph: Any) -> None:
        await graph.ainvoke({}, thread())
        asked = await graph.ainvoke(Command(resume={"maybe": 1}), thread())

        assert asked["__interrupt__"][0].value["question"] == "¿Publico este informe?"
