"""The drawing, with subgraphs as frames; the waterfall; and what is too large for its line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import combinations, pairwise
from random import Random
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from server import Server
from test_page import axe, run_status

Opening = Callable[..., Page]
Picture = Callable[[Page, str], None]

WIDE = {"width": 1600, "height": 900}


def node(page: Page, path: str) -> Any:
    return page.locator(f".node[data-node='{path}']")


def in_state(page: Page, path: str, state: str) -> None:
    expect(node(page, path)).to_have_attribute("data-state", state, timeout=20_000)


def note(page: Page, path: str) -> Any:
    return node(page, path).locator(".note")


def fold(page: Page, path: str) -> Any:
    return page.locator(f".fold[data-fold='{path}']")


def box(page: Page, path: str) -> dict[str, float]:
    found = node(page, path).locator(".box:not(.behind)").bounding_box()
    assert found is not None
    return dict(found)


def holds(outer: dict[str, float], inner: dict[str, float]) -> bool:
    return all(
        outer[at] <= inner[at] and inner[at] + inner[size] <= outer[at] + outer[size]
        for at, size in (("x", "width"), ("y", "height"))
    )


def test_a_subgraph_is_a_frame_whose_nodes_light_up(
    server: Server, opening: Opening, picture: Picture
) -> None:
    for item in range(3):
        server.hold("t", f"look_up{item}")
    server.hold("t", "read1")
    server.hold("t", "edit")
    run_id = server.submit("desk", "t", input={"items": 3})
    page = opening(f"/#/runs/{run_id}", viewport=WIDE)
    in_state(page, "team/library/look_up", "running")
    expect(note(page, "team/library/look_up")).to_contain_text("0 of 3")
    in_state(page, "team", "running")
    in_state(page, "team/library", "running")
    in_state(page, "team/sketch", "done")
    in_state(page, "team/edit", "waiting")
    for item in range(3):
        server.release("t", f"look_up{item}")
    in_state(page, "team/library/look_up", "done")
    expect(note(page, "team/library/look_up")).to_contain_text("× 3")
    expect(note(page, "team/library/read")).to_contain_text("2 of 3")
    expect(note(page, "team/library")).to_contain_text("2 of 3")
    picture(page, "nested")

    assert holds(box(page, "team"), box(page, "team/library"))
    assert holds(box(page, "team/library"), box(page, "team/library/read"))
    assert not holds(box(page, "team"), box(page, "proof"))
    server.release("t", "read1")
    server.release("t", "edit")
    run_status(page, "success")
    in_state(page, "team/edit", "done")
    in_state(page, "team", "done")


def test_a_subgraph_that_is_tried_again_counts_down_on_its_frame(
    server: Server, opening: Opening
) -> None:
    server.hold("t", "edit_fails")
    run_id = server.submit("desk", "t", input={"items": 1})
    page = opening(f"/#/runs/{run_id}", viewport=WIDE)
    in_state(page, "team", "retrying")
    expect(note(page, "team")).to_have_text(re.compile(r"^try \d+ in \d\.\d s$"))
    in_state(page, "team/edit", "failed")
    server.release("t", "edit_fails")
    run_status(page, "success")
    in_state(page, "team", "done")
    in_state(page, "team/edit", "done")


def test_a_failed_run_says_where_it_failed(
    server: Server, opening: Opening, picture: Picture
) -> None:
    server.hold("t", "proof_fails")
    run_id = server.submit("desk", "t", input={"items": 2})
    page = opening(f"/#/runs/{run_id}")
    run_status(page, "error")
    in_state(page, "proof", "failed")
    picture(page, "failed")

    expect(note(page, "proof")).to_have_text("ConnectionError")
    expect(page.locator(".outcome .problem")).to_contain_text("ConnectionError · in proof")


def test_a_subgraph_is_folded_with_the_mouse_and_with_the_keyboard(
    server: Server, opening: Opening
) -> None:
    server.hold("t", "read0")
    run_id = server.submit("desk", "t", input={"items": 1})
    page = opening(f"/#/runs/{run_id}", viewport=WIDE)
    in_state(page, "team/library/read", "running")
    fold(page, "team/library").click()
    expect(node(page, "team/library/read")).to_have_count(0)
    expect(note(page, "team/library")).to_have_text("read")
    expect(fold(page, "team/library")).to_have_attribute("aria-expanded", "false")
    fold(page, "team").focus()
    page.keyboard.press("Enter")
    expect(node(page, "team/library")).to_have_count(0)
    in_state(page, "team", "running")
    assert page.evaluate("document.activeElement.dataset.fold") == "team"
    page.keyboard.press(" ")
    expect(node(page, "team/library")).to_be_visible()
    fold(page, "team/library").press("Enter")
    in_state(page, "team/library/read", "running")
    node(page, "team/library/read").press("Enter")

    expect(node(page, "team/library/read")).to_have_attribute("aria-pressed", "true")
    keys = page.locator(".line .key").all_text_contents()
    assert set(keys) == {"team/library/read"}


def test_subgraphs_are_folded_at_first_where_there_is_no_room(
    server: Server, opening: Opening, picture: Picture
) -> None:
    server.hold("t", "proof")
    run_id = server.submit("desk", "t", input={"items": 1})
    page = opening(f"/#/runs/{run_id}", viewport={"width": 390, "height": 844})
    in_state(page, "proof", "running")
    expect(node(page, "team/sketch")).to_have_count(0)
    in_state(page, "team", "done")
    page.set_viewport_size({"width": 1600, "height": 844})
    expect(node(page, "team/library/read")).to_be_visible()
    page.set_viewport_size({"width": 390, "height": 844})
    fold(page, "team").click()
    in_state(page, "team/sketch", "done")
    picture(page, "narrow-nested")

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_boxes_never_overlap_and_stay_within_their_frames(server: Server, opening: Opening) -> None:
    page = opening()
    for seed in range(60):
        drawn = page.evaluate(
            """async ({ nodes, edges }) => {
              const { grow, layout } = await import(new URL("console/layout.js", document.baseURI));
              return layout(grow(nodes), edges, ({ id }) => !id.endsWith("folded"));
            }""",
            any_graph(Random(seed)),
        )
        assert misplaced(drawn) == [], f"seed {seed}"


def any_graph(random: Random) -> dict[str, Any]:
    """Nodes and edges as the endpoint gives them, with subgraphs up to three levels deep."""
    ids = ["__start__", "__end__"]

    def fill(prefix: str, depth: int) -> None:
        for number in range(random.randint(1, 4)):
            name = f"{prefix}node_{number}"
            if depth < 3 and random.random() < 0.4:
                fill(f"{name}{random.choice(['', '_folded'])}:", depth + 1)
            else:
                ids.append(name)

    fill("", 0)
    pairs = {(random.choice(ids), random.choice(ids)) for _ in range(len(ids) * 2)}
    return {
        "nodes": [{"id": id, "label": id.rpartition(":")[2]} for id in ids],
        "edges": [
            {"source": source, "target": target, "conditional": random.random() < 0.5}
            for source, target in sorted(pairs)
            if source != "__end__" and target != "__start__"
        ],
    }


def misplaced(inside: dict[str, Any]) -> list[str]:
    nodes = inside["nodes"]
    place = {"x": 0, "y": 0, "width": inside["width"], "height": inside["height"]}
    wrong = [one["id"] for one in nodes if not holds(place, one)]
    wrong += [f"{a['id']} over {b['id']}" for a, b in combinations(nodes, 2) if touch(a, b)]
    for one in nodes:
        if within := one.get("inside"):
            room = {**within, "x": 0}
            if not holds({**one, "x": 0, "y": 0}, room):
                wrong.append(f"what is in {one['id']}")
            wrong += misplaced(within)
    return wrong


def touch(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(
        a[at] < b[at] + b[size] and b[at] < a[at] + a[size]
        for at, size in (("x", "width"), ("y", "height"))
    )


def test_a_drawing_that_is_too_wide_shows_what_was_entered_last(
    server: Server, opening: Opening
) -> None:
    run_id = server.submit("story", "t", input={"topic": "rain"})
    server.wait_line(run_id, "run.interrupted")
    page = opening(f"/#/runs/{run_id}", viewport={"width": 390, "height": 844})
    in_state(page, "approve", "interrupted")

    expect(node(page, "approve").locator(".box")).to_be_in_viewport(ratio=1)
    expect(node(page, "think").locator(".box")).not_to_be_in_viewport(ratio=1)


def test_a_graph_that_cannot_be_drawn_shows_what_is_known(server: Server, opening: Opening) -> None:
    server.hold("t", "look_up0")
    run_id = server.submit("undrawn", "t", input={"items": 1})
    page = opening(f"/#/runs/{run_id}")
    in_state(page, "team", "running")
    expect(note(page, "team")).to_have_text("look_up")
    server.release("t", "look_up0")
    run_status(page, "success")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_frames(
    server: Server, opening: Opening, picture: Picture, scheme: str
) -> None:
    server.hold("t", "read0")
    run_id = server.submit("desk", "t", input={"items": 2})
    page = opening(f"/#/runs/{run_id}", viewport=WIDE, color_scheme=scheme)
    in_state(page, "team/library/read", "running")
    picture(page, f"frames-{scheme}")

    assert axe(page) == []


def test_a_cached_node_says_so(server: Server, opening: Opening, picture: Picture) -> None:
    first = server.submit("remembering", "a", input={"size": 4})
    server.wait_line(first, "run.completed")
    second = server.submit("remembering", "b", input={"size": 4})
    server.wait_line(second, "run.completed")
    page = opening(f"/#/runs/{first}")
    in_state(page, "count", "done")
    page.goto(f"{server.url}/#/runs/{second}")
    in_state(page, "count", "cached")
    in_state(page, "spell", "done")
    picture(page, "cached")

    expect(note(page, "count")).to_have_text("cached")
    expect(page.locator(".bar[data-outcome=cached]")).to_have_count(1)


def told(page: Page, *lines: tuple[int, str, dict[str, Any]]) -> None:
    """From now on, a run of `story` is told with these lines: milliseconds, type and data."""
    of_node = {"node": "think", "ns": [], "path": [], "task": "one", "step": 1, "attempt": 1}
    body = ""
    for seq, (ms, type, data) in enumerate(lines, 1):
        ts = datetime.fromtimestamp(ms / 1000, UTC).isoformat()
        of_run = {"v": 1, "seq": seq, "ts": ts, "type": type, "epoch": 1, "thread_id": "t"}
        of = {} if type.startswith("run.") else of_node
        body += json.dumps({**of_run, **of, "data": data}) + "\n"
    headers = {"Content-Type": "application/x-ndjson", "X-Log-Id": "one"}
    page.route("**/stream?*", lambda route: route.fulfill(headers=headers, body=body))
    page.evaluate("location.hash = '#/runs/told'")
    run_status(page, "success")


def shares(outer: Any, inner: str) -> list[list[float]]:
    """Where elements begin, and how wide they are, in hundredths of the one around them."""
    found: list[list[float]] = outer.locator(inner).evaluate_all(
        """(all) => all.map((one) => {
          const inner = one.getBoundingClientRect();
          const outer = one.parentElement.getBoundingClientRect();
          return [inner.left - outer.left, inner.width].map((px) => (100 * px) / outer.width);
        })"""
    )
    return found


BEGUN = (
    (0, "run.queued", {"graph": "story"}),
    (0, "run.started", {}),
    (100, "node.started", {}),
)
RETRYING = {"call": "ask", "error_type": "Busy", "message_ids": []}
NUMBERS = {"final": True, "output": {}, "queue_ms": 0}


def test_the_waterfall_shows_the_back_off_of_calls_within_their_node(
    server: Server, opening: Opening
) -> None:
    page = opening()
    told(
        page,
        *BEGUN,
        (200, "call.retrying", {**RETRYING, "retry_in_ms": 300}),
        (600, "call.retrying", {**RETRYING, "retry_in_ms": 60_000}),
        (1100, "node.completed", {"duration_ms": 1000}),
        (1100, "run.completed", {**NUMBERS, "duration_ms": 1100, "backoff_ms": 250.0}),
    )
    bar = page.locator(".bar")
    first, second = shares(bar, ".pause")
    hit = "([x, y]) => document.elementFromPoint(x, y).className"
    bar.scroll_into_view_if_needed()
    area = bar.bounding_box()
    assert area is not None
    across, down = area["x"] + area["width"], area["y"] + area["height"] / 2

    assert first == pytest.approx([10, 30], abs=1)
    assert second[0] == pytest.approx(50, abs=1)
    assert page.evaluate(hit, [across - 3, down]) == "pause"
    assert page.evaluate(hit, [across + 3, down]) != "pause", "it is longer than its node"
    expect(page.locator(".outcome .facts")).to_contain_text("back-off250 ms")


@pytest.mark.parametrize(
    ("before", "bars"),
    [
        (("custom", {"value": "a word"}), {"lost": [5, 10], "gone": [15, 75]}),
        (("node.completed", {"duration_ms": 200}), {"done": [5, 10]}),
    ],
    ids=["it was under way", "it had ended"],
)
def test_the_waterfall_does_not_colour_the_time_in_which_no_server_was_there(
    server: Server, opening: Opening, before: tuple[str, Any], bars: dict[str, list[float]]
) -> None:
    page = opening()
    lost = {"reason": "crash", "lost": [{"task": "one"}], "discard_from": 9}
    told(
        page,
        *BEGUN,
        (300, *before),
        (1800, "run.recovered", lost),
        (1800, "node.started", {}),
        (2000, "node.completed", {"duration_ms": 200}),
        (2000, "run.completed", {**NUMBERS, "duration_ms": 2000, "backoff_ms": 0}),
    )
    outcomes = page.locator(".bar").evaluate_all("(all) => all.map((one) => one.dataset.outcome)")

    assert outcomes == [*bars, "done"]
    assert shares(page.locator(".rows"), ".bar") == [
        pytest.approx(share, abs=1) for share in (*bars.values(), [90, 10])
    ]
    expect(page.locator(".rows .time")).to_contain_text("2 tries")
    expect(page.locator(".outcome .facts")).not_to_contain_text("back-off")


@pytest.mark.parametrize("width", [360, 700, 950, 1280, 1900])
def test_the_times_of_the_waterfall_do_not_touch(
    server: Server, opening: Opening, width: int
) -> None:
    run_id = server.submit("desk", "t", input={"items": 2})
    server.wait_line(run_id, "run.completed")
    page = opening(f"/#/runs/{run_id}", viewport={"width": width, "height": 860})
    run_status(page, "success")
    for span_ms, recoveries in ((7, []), (900, [10]), (12_345, [6_000, 6_100]), (4_000_000, [0])):
        page.evaluate(
            """async ([span, recoveries]) => {
              const { Waterfall } = await import(new URL("console/waterfall.js", document.baseURI));
              const old = document.querySelector(".rows").parentElement;
              const made = new Waterfall(() => {});
              old.replaceWith(made.element);
              made.render({
                startedAt: 0, now: () => span, visits: new Map(),
                recoveries: recoveries.map((at) => ({ at })),
              });
            }""",
            [span_ms, recoveries],
        )
        ticks = page.locator(".scale .tick").evaluate_all(
            """(all) => all.filter((one) => one.textContent).map((one) => {
              const range = document.createRange();
              range.selectNodeContents(one);
              const { left, right } = range.getBoundingClientRect();
              return [left, right, one.textContent];
            }).sort((a, b) => a[0] - b[0])"""
        )
        assert len(ticks) >= (1 if recoveries else 2)
        assert all(a[1] + 2 <= b[0] for a, b in pairwise(ticks)), ticks


def test_a_long_waterfall_follows_its_end_and_can_be_scrolled_back(
    server: Server, opening: Opening
) -> None:
    server.hold("t", "again50")
    run_id = server.submit("walking", "t", input={}, config={"recursion_limit": 100})
    page = opening(f"/#/runs/{run_id}")
    rows = page.locator(".rows li")
    expect(rows).to_have_count(51)
    expect(rows.last).to_be_in_viewport()
    expect(rows.first).not_to_be_in_viewport()
    page.get_by_role("region", name="Waterfall").evaluate("(one) => { one.scrollTop = 0; }")
    server.release("t", "again50")
    run_status(page, "success")
    expect(rows).to_have_count(60)

    expect(rows.first).to_be_in_viewport()
    expect(page.locator(".scale")).to_be_in_viewport()


def test_what_is_too_large_for_its_line_is_a_link(
    server: Server, opening: Opening, picture: Picture
) -> None:
    size = 1_200_000
    run_id = server.submit("remembering", "t", input={"size": size})
    terminal = server.wait_line(run_id, "run.completed")
    page = opening(f"/#/runs/{run_id}")
    run_status(page, "success")
    outcome = page.locator(".outcome").get_by_role("link")
    expect(outcome).to_contain_text("bytes")
    picture(page, "large")

    assert "$ref" in terminal["data"]["output"]
    with page.expect_popup() as popup:
        outcome.click()
    popup.value.wait_for_load_state()
    assert len(popup.value.text_content("body")) > size
    said = page.locator(".text.message, .text.custom").get_by_role("link")
    hrefs = said.evaluate_all("(all) => all.map((one) => one.href)")
    assert {href.rpartition("/")[2] for href in hrefs} == {"value", "text"}
    assert all(len(server.get(href.removeprefix(server.url)).text) > size for href in hrefs)


def test_a_value_that_only_looks_like_a_link_is_shown_as_it_is(
    server: Server, opening: Opening
) -> None:
    run_id = server.submit("chain", "t")
    server.wait_line(run_id, "run.completed")
    page = opening(f"/#/runs/{run_id}")
    links = page.evaluate(
        """async () => {
          const { moved } = await import(new URL("console/texts.js", document.baseURI));
          return [
            { $ref: "javascript:alert(1)", bytes: 1 },
            { $ref: "//elsewhere.example/v1/runs/a/data/1/output", bytes: 1 },
            { $ref: "#/components/schemas/Line" },
            { $ref: "/v1/runs/a/data/1/output", bytes: 1, more: 2 },
            { $ref: "/v1/runs/a/data/../../../../evil", bytes: 1 },
            { $ref: "/v1/runs/a/data/1/output/../more", bytes: 1 },
            null, "text", 3, [1],
          ].map((value) => moved(value));
        }"""
    )

    assert links == [None] * 10


#: More than fit, side by side; `story` is drawn as this where it is asked for.
LARGE = [f"node_{number}" for number in range(60)] + ["think", "draft", "approve"]


def draw_as(page: Page, nodes: list[str], edges: list[tuple[str, str]]) -> None:
    """From now on, every graph is drawn like this."""
    shape = {
        "nodes": [{"id": id, "label": id} for id in ["__start__", *nodes, "__end__"]],
        "edges": [{"source": source, "target": target} for source, target in edges],
    }
    page.route("**/drawing?*", lambda route: route.fulfill(json=shape))


def fan(nodes: list[str]) -> list[tuple[str, str]]:
    return [edge for one in nodes for edge in (("__start__", one), (one, "__end__"))]


def tab_stops(page: Page) -> int:
    return page.locator(".stage [tabindex='0']").count()


def test_a_large_graph_keeps_to_its_place_and_is_one_tab_stop(
    server: Server, opening: Opening, picture: Picture
) -> None:
    run_id = server.submit("story", "t", input={"topic": "rain"})
    server.wait_line(run_id, "run.interrupted")
    page = opening()
    draw_as(page, LARGE, fan(LARGE))
    page.goto(f"{server.url}/#/graphs/story")
    canvas = page.locator(".canvas")
    expect(canvas).to_have_attribute("tabindex", "0")
    assert page.locator(".stage [role=button], .stage [aria-pressed]").count() == 0
    assert tab_stops(page) == 1
    expect(node(page, "draft")).to_have_attribute("aria-label", "draft")
    picture(page, "large-graph")
    assert axe(page) == []

    page.goto(f"{server.url}/#/runs/{run_id}")
    in_state(page, "approve", "interrupted")
    assert canvas.bounding_box()["height"] <= 0.7 * page.viewport_size["height"] + 1
    expect(node(page, "approve").locator(".box")).to_be_in_viewport(ratio=1)
    expect(node(page, "node_0").locator(".box")).not_to_be_in_viewport()
    assert tab_stops(page) == 1


def test_arrow_keys_go_through_the_drawing(server: Server, opening: Opening) -> None:
    run_id = server.submit("desk", "t", input={"items": 1})
    server.wait_line(run_id, "run.completed")
    page = opening(f"/#/runs/{run_id}", viewport=WIDE)
    in_state(page, "team/library/read", "done")
    buttons = page.locator(".stage [role=button]")
    buttons.first.focus()
    passed = []
    for _ in range(buttons.count()):
        passed.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert tab_stops(page) == 1
        page.keyboard.press("ArrowRight")

    assert len(set(passed)) == len(passed)
    expect(buttons.last).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(buttons.nth(-2)).to_be_focused()
    page.keyboard.press("Home")
    expect(buttons.first).to_be_focused()
    page.keyboard.press("End")
    expect(buttons.last).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.stage')") is None
    page.keyboard.press("Shift+Tab")
    expect(buttons.last).to_be_focused()


def test_the_focus_survives_that_the_drawing_is_drawn_again(
    server: Server, opening: Opening
) -> None:
    run_id = server.submit("desk", "t", input={"items": 1})
    server.wait_line(run_id, "run.completed")
    page = opening(f"/#/runs/{run_id}", viewport=WIDE)
    fold(page, "team").focus()
    page.set_viewport_size({"width": 390, "height": 844})
    expect(node(page, "team/sketch")).to_have_count(0)
    expect(fold(page, "team")).to_be_focused()
    page.set_viewport_size(WIDE)
    expect(node(page, "team/library/read")).to_be_visible()
    expect(fold(page, "team")).to_be_focused()
    node(page, "team/library/read").focus()
    page.set_viewport_size({"width": 390, "height": 844})

    expect(node(page, "team")).to_be_focused()
    assert tab_stops(page) == 1


def test_a_fold_is_large_enough_to_be_hit(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/desk", viewport={"width": 390, "height": 844})
    area = fold(page, "team").locator(".reach").bounding_box()
    assert area is not None
    assert min(area["width"], area["height"]) >= 24
    page.mouse.click(area["x"] + 2, area["y"] + 2)
    expect(fold(page, "team")).to_have_attribute("aria-expanded", "true")


def test_a_node_whose_question_was_answered_says_so(server: Server, opening: Opening) -> None:
    run_id = server.submit("story", "t", input={"topic": "rain"})
    server.wait_line(run_id, "run.interrupted")
    page = opening(f"/#/runs/{run_id}")
    expect(note(page, "approve")).to_have_text("needs an answer")
    server.wait_line(server.resume("t", "yes"), "run.completed")
    page.reload()
    expect(note(page, "approve")).to_have_text("answered")


def test_a_drawing_says_when_it_lacks_edges(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/desk")
    told = page.get_by_text("Not all edges of this graph are known.")
    expect(node(page, "proof")).to_be_visible()
    expect(told).to_have_count(0)
    draw_as(page, ["think", "draft"], fan(["think"]))
    page.goto(f"{server.url}/#/graphs/story")
    expect(told).to_be_visible()


def test_the_waterfall_tells_how_a_visit_ended_without_its_colour(
    server: Server, opening: Opening
) -> None:
    server.hold("t", "proof_fails")
    run_id = server.submit("desk", "t", input={"items": 1})
    ended = {
        line["node"]: f"{int(line['data']['duration_ms'] + 0.5)} ms"
        for line in server.lines(run_id)
        if line["type"] in ("node.completed", "node.failed")
    }
    page = opening(f"/#/runs/{run_id}")
    run_status(page, "error")
    rows = page.locator(".rows li")
    proof = rows.filter(has=page.get_by_role("button", name="proof: failed"))
    edit = rows.filter(has=page.get_by_role("button", name="edit: done"))

    expect(proof.locator(".time")).to_have_text(f"✕ {ended['proof']}")
    expect(edit.locator(".time")).to_have_text(ended["edit"])
