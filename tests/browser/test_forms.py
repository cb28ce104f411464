"""The forms of the page: what starts a run, and what answers one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect
from server import Server, until, whole
from test_drawing import note
from test_page import axe, copied

Opening = Callable[..., Page]
Picture = Callable[[Page, str], None]

ORDER: dict[str, Any] = {
    "customer": "Ana",
    "amount": 3,
    "weight": 1.5,
    "speed": "fast",
    "gift": True,
    "place": {"city": "Lugo", "zip": "27001", "more": [1]},
    "tags": ["a", ""],
    "days": ["tue"],
    "stock": {"apples": 2, "no pears": 0},
    "pet": {"kind": "dog", "tricks": ["sit"]},
    "code": "x1",
    "tree": {"label": "oak", "children": [{"label": "twig", "children": []}]},
    "free": {"any": {"thing": None}},
    "note": "two\nlines",
    "unknown": {"kept": True},
}


def form_of(page: Page) -> Locator:
    return page.get_by_role("region", name="Input")


def written(page: Page) -> Any:
    """The input as its JSON says it."""
    return json.loads(page.locator("#json").input_value())


def curl_body(page: Page) -> Any:
    """What the curl sends."""
    words = shlex.split((page.locator(".start .curl").text_content() or "").replace("\\\n", " "))
    return json.loads(words[words.index("-d") + 1])


def run_status(page: Page, status: str) -> None:
    expect(page.locator(".run-head .chip")).to_contain_text(status, timeout=20_000)


def started(page: Page, server: Server) -> Any:
    """The result of the run that the page goes to when it starts one."""
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url("**/#/runs/*")
    return server.get(f"/v1/runs/{page.url.rpartition('/')[2]}/wait").json()


# The input.


def test_a_form_asks_for_everything_that_a_schema_names(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/order")
    form = form_of(page)
    form.get_by_label("Customer").fill("Ana")
    form.get_by_label("Amount").fill("3")
    form.get_by_label("Weight").fill("1.5")
    form.get_by_label("Speed").select_option("fast")
    form.get_by_label("Gift").select_option("true")
    form.get_by_label("City").fill("Lugo")
    tags = form.get_by_role("group", name="Tags")
    tags.get_by_role("button", name="Add").click()
    tags.get_by_label("Tags 1", exact=True).fill("a")
    form.get_by_label("tue").check()
    stock = form.get_by_role("group", name="Stock")
    stock.get_by_role("button", name="Add").click()
    stock.get_by_label("Name of Stock 1").fill("apples")
    stock.get_by_label("Value of Stock 1").fill("2")
    form.get_by_label("Kind of Pet").select_option("Dog")
    form.get_by_label("Kind of Code").select_option("text")
    form.get_by_label("text", exact=True).fill("7")
    form.get_by_role("group", name="Tree").get_by_label("Label").first.fill("oak")
    form.get_by_label("Free").fill('{"any": 1}')

    assert written(page) == {
        "customer": "Ana",
        "amount": 3,
        "weight": 1.5,
        "speed": "fast",
        "gift": True,
        "place": {"city": "Lugo"},
        "tags": ["a"],
        "days": ["tue"],
        "stock": {"apples": 2},
        "pet": {"kind": "dog"},
        "code": "7",
        "tree": {"label": "oak"},
        "free": {"any": 1},
    }
    assert curl_body(page) == {"graph": "order", "input": written(page)}
    assert started(page, server)["status"] == "success"


def test_what_is_written_as_json_comes_back_from_the_form_as_it_was(opening: Opening) -> None:
    page = opening("/#/graphs/order")
    page.locator("#json").fill(json.dumps(ORDER))
    form_of(page).get_by_label("Customer").fill("Eva")

    assert written(page) == ORDER | {"customer": "Eva"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("amount", "many", id="a text for a number"),
        pytest.param("amount", 1.5, id="a fraction for a whole number"),
        pytest.param("speed", "warp", id="a word that is not in the enum"),
        pytest.param("gift", "yes", id="a text for a boolean"),
        pytest.param("tags", {"a": 1}, id="an object for a list"),
        pytest.param("days", ["mon", "mon"], id="a set with one thing twice"),
        pytest.param("place", "Lugo", id="a text for an object"),
        pytest.param("pet", {"kind": "cow"}, id="none of the choices"),
        pytest.param("stock", [1], id="a list for an object"),
        pytest.param("note", None, id="a null"),
        pytest.param("note", "", id="an empty text"),
        pytest.param("place", {}, id="an empty object"),
        pytest.param("tags", [], id="an empty list"),
        pytest.param("stock", {}, id="an object without entries"),
        pytest.param("tree", {}, id="an optional object that is empty"),
        pytest.param("tags", [None, 1, {"a": []}], id="items of other types"),
    ],
)
def test_a_form_loses_nothing_that_it_cannot_show(opening: Opening, name: str, value: Any) -> None:
    page = opening("/#/graphs/order")
    page.locator("#json").fill(json.dumps({name: value}))
    form_of(page).get_by_label("Customer").fill("Eva")

    expected = {"customer": "Eva", name: value}
    assert written(page) in (expected, expected | {"place": {}})


def test_a_field_says_what_is_wrong_with_it_and_is_gone_to(opening: Opening) -> None:
    page = opening("/#/graphs/order")
    amount = form_of(page).get_by_label("Amount")
    for text, told in (
        ("11", "use 10 or less"),
        ("0", "use 1 or more"),
        ("1.5", "this is not a whole number"),
    ):
        amount.fill(text)
        expect(amount).to_have_attribute("aria-invalid", "true")
        expect(amount).to_have_accessible_description(told)
    page.get_by_role("button", name="Start the run").click()
    expect(amount).to_be_focused()
    amount.fill("2")

    expect(amount).not_to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert written(page)["amount"] == 2


def test_a_field_that_the_server_refuses_is_gone_to(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/order")
    city = form_of(page).get_by_label("City")
    page.locator("#json").fill('{"customer": "Ana", "amount": 1, "place": {"zip": "1"}}')
    page.get_by_role("button", name="Start the run").click()

    expect(city).to_be_focused()
    expect(city).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_contain_text("input.place.city: Field required")
    city.fill("Lugo")
    assert started(page, server)["status"] == "success"


def test_a_message_is_written_as_text(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/chat")
    form_of(page).get_by_label("Message").fill("Hello")
    assert written(page) == {"messages": [{"role": "user", "content": "Hello"}]}
    result = started(page, server)

    assert result["output"]["messages"][0]["content"] == "Hello"


# Schemas of every kind: those of a state, and those that no form can read.

NONSENSE: list[Any] = [
    {"enum": "abc"},
    {"anyOf": "x"},
    {"$ref": 5},
    {"type": "object", "properties": {"a": None}},
    {"type": "object", "properties": {"a": {"enum": 5}}, "required": 5},
    {"type": "array", "items": {"enum": 5}, "uniqueItems": True},
    {"type": "array", "items": {"type": "object", "properties": {"a": {"oneOf": {}}}}},
    {"anyOf": [{"type": "object", "properties": {"a": {"enum": 5}}}, {"type": "integer"}]},
    {"type": "constructor"},
]


def of_schema(opening: Opening, schema: Any) -> Page:
    """The page before a graph that says to take such an input."""
    page = opening("/#/graphs/chat")
    answer = {"input": schema, "output": {}, "context": None}
    page.route("**/v1/graphs/order/schema", lambda route: route.fulfill(json=answer))
    page.get_by_role("button", name="order").click()
    expect(page.get_by_role("button", name="order")).to_have_attribute("aria-pressed", "true")
    return page


@pytest.mark.parametrize("schema", NONSENSE, ids=json.dumps)
def test_what_no_form_can_read_is_written_as_json(opening: Opening, schema: Any) -> None:
    inside = {"type": "object", "properties": {"odd": schema, "plain": {"type": "string"}}}
    page = of_schema(opening, inside)
    form_of(page).get_by_label("plain").fill("a")
    for odd in ([{"a": 1}], {"a": 1}, 7):
        page.locator("#json").fill(json.dumps({"odd": odd, "plain": "b"}))
        form_of(page).get_by_label("plain").fill("c")
        assert written(page) == {"odd": odd, "plain": "c"}
    page = of_schema(opening, schema)
    page.locator("#json").fill('{"a": 1}')

    assert curl_body(page)["input"] == {"a": 1}


def test_names_that_every_object_knows_are_fields_like_others(opening: Opening) -> None:
    names = ["constructor", "__proto__", "toString", "hasOwnProperty"]
    text = {"anyOf": [{"type": "object", "required": names[:1]}, {"type": "string"}]}
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    page = of_schema(opening, schema | {"properties": schema["properties"] | {"either": text}})
    for name in names:
        expect(form_of(page).get_by_label(name)).to_have_value("")
        form_of(page).get_by_label(name).fill(f"a {name}")
    page.locator("#json").fill(page.locator("#json").input_value())
    form_of(page).get_by_label("toString").fill("b")

    assert written(page) == {name: f"a {name}" for name in names} | {"toString": "b"}
    assert curl_body(page)["input"] == written(page)
    page.locator("#json").fill('{"either": {}}')
    expect(form_of(page)).to_contain_text("It is {}, which this field cannot show.")


def test_a_wide_schema_is_looked_into_less_deep(opening: Opening) -> None:
    kinds: dict[str, Any] = {
        f"K{n}": {
            "type": "object",
            "properties": {f"p{m}": {"$ref": f"#/$defs/K{m}"} for m in range(8) if m != n},
        }
        for n in range(8)
    }
    top = {"type": "object", "properties": {"first": {"$ref": "#/$defs/K0"}}}
    last = {"last": {"type": "string"}, "list": {"type": "array", "items": {"type": "string"}}}
    top["properties"] |= {f"q{n}": {"$ref": f"#/$defs/K{n}"} for n in range(8)} | last
    page = of_schema(opening, top | {"$defs": kinds})
    assert page.locator("*").count() < 4000
    value = {"first": {"p1": {"p2": {"p3": 1}}}, "last": "a", "list": ["x"] * 600}
    page.locator("#json").fill(json.dumps(value))
    form_of(page).get_by_label("last").fill("b")

    assert written(page) == value | {"last": "b"}
    expect(form_of(page).locator("input, textarea").last).to_have_value("x")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('{"amount": 12345678901234567890}', "12345678901234567890"),
        ('{"code": [-9007199254740993]}', "-9007199254740993"),
        ('{"weight": 1e999}', "1e999"),
    ],
)
def test_a_number_that_would_be_sent_as_another_is_refused(
    opening: Opening, text: str, number: str
) -> None:
    page = opening("/#/graphs/order")
    page.locator("#json").fill(text)
    expect(page.get_by_role("alert")).to_contain_text(f"{number} is too large a number")
    page.get_by_role("button", name="Start the run").click()
    expect(page.locator("#json")).to_be_focused()
    page.locator("#json").fill('{"amount": 9007199254740991, "weight": 1e300, "note": "1e999"}')

    assert curl_body(page)["input"] == {
        "amount": 9007199254740991,
        "weight": 1e300,
        "note": "1e999",
    }


def test_a_field_refuses_a_number_that_would_be_sent_as_another(opening: Opening) -> None:
    page = of_schema(
        opening, {"type": "object", "properties": {"count": {"type": "integer"}, "any": {}}}
    )
    for label in ("count", "any"):
        field = form_of(page).get_by_label(label)
        field.fill("12345678901234567890")
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_have_accessible_description(re.compile("too large a number"))
        field.fill("1")

    assert written(page) == {"count": 1, "any": 1}


def test_a_graph_without_a_schema_leaves_the_others_to_be_chosen(opening: Opening) -> None:
    page = opening("/#/graphs/chat")
    gone = {"status": 404, "detail": "graph 'story' not found"}
    page.route(
        "**/v1/graphs/story/schema", lambda route: route.fulfill(status=404, json=gone), times=1
    )
    page.get_by_role("button", name="story").click()
    expect(page.get_by_role("alert")).to_have_text("graph 'story' not found")
    expect(page.get_by_role("button", name="story")).to_be_focused()
    page.get_by_role("button", name="chat").click()
    expect(form_of(page).get_by_label("Message")).to_be_visible()
    page.get_by_role("button", name="story").click()

    expect(form_of(page).get_by_label("Topic")).to_be_visible()


def test_a_form_does_not_wait_for_its_drawing(opening: Opening) -> None:
    page = opening("/#/graphs/chat")
    held: list[Any] = []
    page.route("**/v1/graphs/story/drawing?*", lambda route: held.append(route))
    page.get_by_role("button", name="story").click()
    form_of(page).get_by_label("Topic").fill("rain")
    expect(page.get_by_role("region", name="Drawing")).to_be_hidden()
    assert curl_body(page) == {"graph": "story", "input": {"topic": "rain"}}
    held.pop().continue_()

    expect(page.get_by_role("region", name="Drawing")).to_contain_text("think")
    expect(form_of(page).get_by_label("Topic")).to_have_value("rain")


def test_a_form_that_is_left_starts_nothing(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/chat")
    form_of(page).get_by_label("Message").fill("Hello")
    held: list[Any] = []
    page.route("**/v1/graphs/story/schema", lambda route: held.append(route))
    page.get_by_role("button", name="story").click()
    until(lambda: page.evaluate("location.hash") == "#/graphs/story" and held, "it is asked for")
    page.get_by_role("button", name="Start the run", include_hidden=True).click(force=True)
    held.pop().continue_()
    expect(form_of(page).get_by_label("Topic")).to_be_visible()

    assert server.get("/v1/runs").json()["runs"] == []
    expect(page.get_by_role("button", name="story")).to_be_focused()


def test_an_address_without_a_run_is_a_new_run(opening: Opening) -> None:
    page = opening("/#/runs/")

    expect(page.get_by_role("heading", name="New run")).to_be_visible()
    expect(page).to_have_title("New run · Sereno")


# What else a run takes.


def test_a_run_gets_its_context_and_whatever_else_is_said(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/greeting")
    context = page.get_by_role("region", name="Context")
    expect(context.get_by_text("3 unless said.")).to_be_visible()
    context.get_by_label("User").fill("ana")
    page.get_by_label("Thread").fill("t")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Deadline").fill("60")
    page.get_by_label("values", exact=True).check()
    page.get_by_label("Metadata").fill('{"by": "hand"}')
    page.get_by_label("Durability").select_option("sync")
    page.get_by_label("Configurable").fill('{"key": "x"}')
    page.get_by_label("Recursion limit").fill("9")

    assert curl_body(page) == {
        "graph": "greeting",
        "input": {},
        "thread_id": "t",
        "context": {"user": "ana"},
        "deadline_s": 60,
        "stream": ["values"],
        "metadata": {"by": "hand"},
        "durability": "sync",
        "config": {"configurable": {"key": "x"}, "recursion_limit": 9},
    }
    assert started(page, server)["output"] == {"said": ["ana 3"]}
    run = server.get(f"/v1/runs/{server.run_on('t')}").json()
    assert run["stream"] == ["values"]
    assert run["metadata"] == {"by": "hand"}
    assert run["deadline"] is not None


def test_a_refused_field_is_unfolded(opening: Opening) -> None:
    page = opening("/#/graphs/greeting")
    page.get_by_text("More", exact=True).click()
    limit = page.get_by_label("Recursion limit")
    limit.fill("100000000")
    page.get_by_text("More", exact=True).click()
    expect(limit).to_be_hidden()
    page.get_by_role("button", name="Start the run").click()

    expect(limit).to_be_focused()
    expect(page.get_by_role("alert")).to_contain_text("config.recursion_limit")


def test_a_busy_thread_leads_to_the_run_that_has_it(server: Server, opening: Opening) -> None:
    server.hold("t", "think")
    run_id = server.submit("story", "t", input={"topic": "rain"})
    page = opening("/#/graphs/story")
    page.get_by_label("Thread").fill("t")
    page.get_by_role("button", name="Start the run").click()
    page.get_by_role("link", name="Go to that run").click()

    page.wait_for_url(f"**/#/runs/{run_id}")
    server.release("t", "think")


# Answers.


def asked(server: Server, opening: Opening, graph: str) -> Page:
    """A page before a run that asks, on thread t."""
    run_id = server.submit(graph, "t", input={})
    server.wait_line(run_id, "run.interrupted")
    page = opening(f"/#/runs/{run_id}")
    expect(page.locator(".asks")).to_be_visible()
    return page


def said(server: Server, page: Page) -> Any:
    """What the graph made of the answers."""
    run_status(page, "success")
    run_id = page.url.rpartition("/")[2]
    return server.get(f"/v1/runs/{run_id}/wait").json()["output"]["said"]


def test_an_answer_has_the_form_that_its_schema_asks_for(server: Server, opening: Opening) -> None:
    page = asked(server, opening, "judging")
    form = page.get_by_role("form", name="The run asks")
    expect(form).to_contain_text("What do you think?")
    expect(form.get_by_label("Score")).to_have_value("3")
    form.get_by_role("button", name="Answer").click()
    expect(form.get_by_label("Approved")).to_be_focused()
    expect(form.get_by_role("alert")).to_have_text("Approved: this has to be filled in")
    form.get_by_label("Approved").select_option("true")
    form.get_by_label("Score").fill("9")
    form.get_by_role("button", name="Answer").click()
    expect(form.get_by_label("Score")).to_be_focused()
    expect(form.get_by_role("alert")).to_contain_text("use 5 or less")
    form.get_by_label("Score").fill("5")
    form.get_by_role("button", name="Answer").click()

    assert said(server, page) == [{"approved": True, "score": 5, "reasons": []}]


def test_several_questions_are_answered_at_once(server: Server, opening: Opening) -> None:
    page = asked(server, opening, "asking_two")
    form = page.get_by_role("form", name="The run asks")
    expect(form.get_by_role("heading")).to_have_text("The run waits for 2 answers")
    judged = form.get_by_role("group", name="Question").filter(has_text="What do you think?")
    other = form.get_by_role("group", name="Question").filter(has_text="Anything else?")
    judged.get_by_label("Approved").select_option("false")
    form.get_by_role("button", name="Answer all").click()
    expect(other.get_by_role("textbox")).to_be_focused()
    expect(form.get_by_role("alert")).to_contain_text("waits for an answer")
    other.get_by_role("textbox").fill('["yes", 2]')
    expect(other).to_contain_text("Taken as JSON.")
    form.get_by_role("button", name="Answer all").click()

    answers = said(server, page)
    assert {"approved": False, "score": 3, "reasons": []} in answers
    assert ["yes", 2] in answers


def test_a_question_of_a_subgraph_is_answered(server: Server, opening: Opening) -> None:
    page = asked(server, opening, "asking_inside")
    page.get_by_label("Approved").select_option("true")
    page.locator(".asks").get_by_role("button", name="Answer").click()

    assert said(server, page) == [{"approved": True, "score": 3, "reasons": []}]


def test_a_question_that_is_too_large_for_its_line_keeps_its_form(
    server: Server, opening: Opening
) -> None:
    page = asked(server, opening, "asking_much")
    terminal = server.lines(page.url.rpartition("/")[2])[-1]
    assert "$ref" in terminal["data"]["interrupts"]
    expect(page.locator(".asks")).to_contain_text("All of it?")
    box = page.locator(".asks").bounding_box()
    assert box is not None
    assert box["height"] < 900, "the answer is out of reach"
    page.get_by_label("Approved").select_option("true")
    page.locator(".asks").get_by_role("button", name="Answer").click()

    assert said(server, page) == [True]


def test_an_answer_that_did_not_fit_is_asked_for_again(server: Server, opening: Opening) -> None:
    """LangGraph finds out when the answer is there: the run fails, and the thread still asks."""
    page = asked(server, opening, "evening")
    asking = page.url
    page.get_by_label("Number").fill("3")
    page.locator(".asks").get_by_role("button", name="Answer").click()
    run_status(page, "error")
    page.goto(asking)
    expect(page.locator(".asks")).to_contain_text("asks again")
    page.get_by_label("Number").fill("4")
    page.locator(".asks").get_by_role("button", name="Answer").click()

    assert said(server, page) == [{"number": 4}]


def test_who_answers_second_is_told_and_led_on(server: Server, opening: Opening) -> None:
    page = asked(server, opening, "judging")
    page.get_by_label("Approved").select_option("true")
    answered = server.resume("t", {"approved": False})
    page.locator(".asks").get_by_role("button", name="Answer").click()

    expect(page.locator(".question")).to_contain_text("This was answered")
    expect(page.get_by_role("link", name=answered)).to_be_visible()
    expect(page.locator(".asking > section")).to_be_focused()


def test_a_question_that_is_answered_elsewhere_goes_away(server: Server, opening: Opening) -> None:
    page = asked(server, opening, "judging")
    answered = server.resume("t", {"approved": False})

    expect(page.locator(".question")).to_contain_text(answered, timeout=20_000)
    expect(page.locator(".asks")).to_have_count(0)


def test_the_drawing_tells_that_a_question_was_answered_elsewhere(
    server: Server, opening: Opening
) -> None:
    run_id = server.submit("story", "t", input={"topic": "rain"})
    server.wait_line(run_id, "run.interrupted")
    page = opening(f"/#/runs/{run_id}")
    expect(page.locator(".asks")).to_be_visible()
    expect(note(page, "approve")).to_have_text("needs an answer")
    server.resume("t", "yes")

    expect(note(page, "approve")).to_have_text("answered", timeout=20_000)


def altered(
    server: Server, opening: Opening, graph: str, alter: Callable[[dict[str, Any]], None]
) -> Page:
    """A page before a run that asks; what its last line says was altered."""
    run_id = server.submit(graph, "t", input={})
    server.wait_line(run_id, "run.interrupted")
    *lines, last = whole(server.raw(run_id)).splitlines()
    line = json.loads(last)
    alter(line["data"])
    body = b"".join(line + b"\n" for line in (*lines, json.dumps(line).encode()))
    headers = {"X-Log-Id": "one", "Content-Type": "application/x-ndjson"}
    page = opening()
    page.route("**/stream?*", lambda route: route.fulfill(headers=headers, body=body))
    page.goto(f"{server.url}/#/runs/{run_id}")
    expect(page.locator(".asks")).to_be_visible()
    page.unroute("**/stream?*")
    return page


@pytest.mark.parametrize("schema", NONSENSE[:4], ids=json.dumps)
def test_an_answer_whose_schema_no_form_can_read_is_written_as_json(
    server: Server, opening: Opening, schema: Any
) -> None:
    page = altered(
        server,
        opening,
        "asking_free",
        lambda data: data["interrupts"][0].update(response_schema=schema),
    )
    page.locator(".asks").get_by_role("textbox").fill('"7"')
    page.locator(".asks").get_by_role("button", name="Answer").click()

    assert said(server, page) in (["7"], [{"a": "7"}])


def test_a_question_that_is_too_large_for_the_log_is_the_threads(
    server: Server, opening: Opening
) -> None:
    page = altered(
        server,
        opening,
        "judging",
        lambda data: data.update(interrupts={"$truncated": True, "bytes": 70_000_000}),
    )
    page.get_by_label("Approved").select_option("true")
    page.locator(".asks").get_by_role("button", name="Answer").click()

    assert said(server, page) == [{"approved": True, "score": 3, "reasons": []}]


def test_an_answer_that_would_be_sent_as_another_number_is_refused(
    server: Server, opening: Opening
) -> None:
    page = asked(server, opening, "asking_free")
    answer = page.get_by_label("Answer", exact=True)
    answer.fill("12345678901234567890")
    send = page.locator(".asks").get_by_role("button", name="Answer")
    send.click()
    expect(page.get_by_role("alert")).to_contain_text("12345678901234567890 is too large a number")
    answer.fill('"12345678901234567890"')
    send.click()

    assert said(server, page) == ["12345678901234567890"]


def test_a_refused_answer_is_told_and_can_be_sent_again(server: Server, opening: Opening) -> None:
    page = asked(server, opening, "judging")
    problem = {"status": 503, "code": "queue_full", "detail": "1000 runs wait already"}
    page.route("**/resume", lambda route: route.fulfill(status=503, json=problem), times=1)
    page.get_by_label("Approved").select_option("true")
    send = page.locator(".asks").get_by_role("button", name="Answer")
    send.click()
    expect(page.get_by_role("alert")).to_contain_text("1000 runs wait already")
    send.click()

    assert said(server, page) == [{"approved": True, "score": 3, "reasons": []}]


def test_what_was_written_is_kept_when_somebody_else_answers(
    server: Server, opening: Opening
) -> None:
    page = asked(server, opening, "asking_two")
    questions = page.get_by_role("group", name="Question")
    writing = questions.filter(has_text="Anything else?").get_by_role("textbox")
    writing.fill("a long thought")
    answers = {
        one["id"]: {"approved": True} if "response_schema" in one else "no"
        for one in server.get("/v1/threads/t/state").json()["interrupts"]
    }
    later = server.resume("t", answers)
    expect(page.locator(".question")).to_contain_text("This was answered", timeout=20_000)

    expect(page.get_by_role("link", name=later)).to_be_visible()
    expect(page.locator(".asking > section")).to_be_focused()
    expect(page.locator(".asks h2")).to_have_text("What you wrote was not sent")
    expect(writing).to_have_value("a long thought")
    expect(writing).not_to_be_editable()
    expect(page.get_by_role("button", name="Answer all")).to_be_disabled()


def test_the_thread_of_an_answer_that_came_to_nothing_still_asks(
    server: Server, opening: Opening
) -> None:
    asking = {thread: server.submit("evening", thread, input={}) for thread in ("wrong", "right")}
    for run_id in asking.values():
        server.wait_line(run_id, "run.interrupted")
    server.wait_line(server.resume("wrong", {"number": 3}), "run.failed")
    server.wait_line(server.resume("right", {"number": 4}), "run.completed")
    page = opening()

    def told(thread: str) -> Locator:
        return page.locator(f"#runs a[href='#/runs/{asking[thread]}']")

    expect(told("wrong")).to_contain_text("needs an answer")
    expect(told("right")).to_contain_text("interrupted")


def test_a_question_is_asked_on_after_the_run_that_took_an_answer_was_cancelled(
    server: Server, opening: Opening
) -> None:
    page = asked(server, opening, "asking_long")
    asking = page.url
    page.get_by_label("Answer", exact=True).fill("an hour")
    page.locator(".asks").get_by_role("button", name="Answer").click()
    run_status(page, "running")
    page.get_by_role("button", name="Cancel", exact=True).click()
    run_status(page, "cancelled")
    page.goto(asking)

    expect(page.locator(".asks")).to_contain_text("asks again")
    expect(page.locator("#runs a[aria-current]")).to_contain_text("needs an answer")


def test_a_long_question_is_scrolled_with_the_keyboard(server: Server, opening: Opening) -> None:
    page = asked(server, opening, "asking_much")
    about = page.get_by_role("region", name="What is asked about")
    about.focus()
    page.keyboard.press("PageDown")

    until(lambda: about.evaluate("(element) => element.scrollTop") > 0, "it scrolls")
    assert axe(page) == []


# The keyboard and the list.


def test_the_focus_goes_where_the_eyes_go(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/story")
    page.get_by_role("button", name="judging").press("Enter")
    expect(page.get_by_role("button", name="judging")).to_be_focused()
    expect(page.get_by_role("button", name="judging")).to_have_attribute("aria-pressed", "true")
    page.locator("#json").press("Control+Enter")
    expect(page.locator(".watch h1")).to_be_focused()
    expect(page.locator("#announcer")).to_have_text("The run waits for an answer")
    page.get_by_label("Approved").select_option("true")
    page.get_by_label("Score").press("Control+Enter")
    run_status(page, "success")
    expect(page.locator(".watch h1")).to_be_focused()
    page.reload()
    page.wait_for_selector(".view")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")

    expect(page.locator("main")).to_be_focused()


def test_one_line_is_copied_and_closed_with_the_keyboard(server: Server, opening: Opening) -> None:
    run_id = server.submit("judging", "t", input={})
    server.wait_line(run_id, "run.interrupted")
    page = opening(f"/#/runs/{run_id}")
    lines = page.get_by_role("listbox", name="Lines")
    lines.press("Home")
    lines.press("ArrowDown")
    lines.press("Control+c")
    expect(page.locator("#announcer")).to_have_text("Line copied")
    first = page.evaluate("navigator.clipboard.readText()")
    page.get_by_role("button", name="Copy line").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    second = page.evaluate("navigator.clipboard.readText()")
    page.get_by_label("The chosen line").press("Escape")

    assert first == second == server.raw(run_id).splitlines()[1].decode()
    expect(lines).to_be_focused()
    expect(page.get_by_label("The chosen line")).to_be_hidden()
    page.get_by_label("Filter lines by text").fill("nothing is like this")
    expect(page.get_by_text("No line fits.")).to_be_visible()


def test_a_line_says_first_what_was_said(server: Server, opening: Opening) -> None:
    run_id = server.submit("story", "t", input={"topic": "rain"})
    server.wait_line(run_id, "run.interrupted")
    page = opening(f"/#/runs/{run_id}")
    page.get_by_label("Filter lines by type").select_option("token")
    first = page.locator(".line").first

    expect(first.locator(".data")).to_have_text(
        re.compile(r'^\{"text":"a stormy start","message_id":')
    )
    expect(first).to_have_accessible_name(re.compile(r'^\d+ token draft \{"text":"a stormy'))


def test_lines_take_the_room_that_they_need(server: Server, opening: Opening) -> None:
    run_id = server.submit("judging", "t", input={})
    count = server.wait_line(run_id, "run.interrupted")["seq"]
    assert count < 14
    page = opening(f"/#/runs/{run_id}")
    run_status(page, "interrupted")
    lines = page.get_by_role("listbox", name="Lines")
    few = lines.bounding_box()
    key = page.locator(".line .key").last.bounding_box()
    page.get_by_label("Filter lines by type").select_option("run.queued")
    one = lines.bounding_box()
    page.goto(
        f"{server.url}/#/runs/{server.submit('talkative', 'u', input={'seen': [], 'size': 99})}"
    )
    run_status(page, "success")
    many = lines.bounding_box()

    heights = [box["height"] for box in (few, one, many) if box]
    assert heights == [count * 22 + 2, 24, 310]
    assert key is not None
    assert key["width"] < 60, "a column is wider than what is in it"


def test_the_focus_stays_when_a_button_goes_away(server: Server, opening: Opening) -> None:
    for n in range(31):
        server.submit("greeting", f"t{n}", context={"user": "a"})
    run_id = server.submit("chain", "t")
    server.wait_line(run_id, "run.completed")
    page = opening(f"/#/runs/{run_id}")
    run_status(page, "success")
    page.locator(".rows .name").first.click()
    page.get_by_role("button", name="Show the lines of every node").press("Enter")
    expect(page.get_by_role("listbox", name="Lines")).to_be_focused()
    older = page.get_by_role("button", name="Older runs")
    older.press("Enter")
    expect(older).to_be_hidden()

    expect(page.locator("#runs li").nth(30).locator("a")).to_be_focused()


def test_a_narrow_window_shows_the_run_that_was_chosen(server: Server, opening: Opening) -> None:
    for n in range(8):
        server.submit("greeting", f"t{n}", context={"user": "a"})
    page = opening(viewport={"width": 320, "height": 256})
    page.locator("#runs a").first.click()

    expect(page.locator(".watch h1")).to_be_focused()
    expect(page.locator(".watch h1")).to_be_in_viewport()


def test_buttons_that_copy_say_what(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/story")
    assert copied(page, "Copy the command") == page.locator(".start .curl").text_content()
    run_id = ended(server)
    page.goto(f"{server.url}/#/runs/{run_id}")
    run_status(page, "interrupted")
    assert copied(page, "Copy the lines").encode() == whole(server.raw(run_id))


def test_nothing_is_being_written_in_a_run_that_is_over(server: Server, opening: Opening) -> None:
    """Its last message has come in part, and another one has only calls."""
    run_id = server.submit("story", "t", input={"topic": "rain"})
    server.wait_line(run_id, "run.interrupted")
    *lines, last = [line for line in server.lines(run_id) if line["type"] != "message"]
    token = next(line for line in reversed(lines) if line["type"] == "token")
    calls = {"message_id": "x", "text": "", "tool_calls": [{"name": "look", "args": {"up": 1}}]}
    page = opening()
    carets, texts = page.evaluate(
        """async ([lines, last]) => {
          const at = (name) => new URL(`console/${name}.js`, document.baseURI);
          const [{ Run }, { Texts }] = [await import(at("run")), await import(at("texts"))];
          const run = new Run("x");
          const texts = new Texts();
          document.querySelector("main").replaceChildren(texts.element);
          const carets = () => [...document.querySelectorAll(".message .said")]
            .map((said) => getComputedStyle(said, "::after").content);
          lines.forEach((line) => run.fold(line));
          texts.render(run);
          const before = carets();
          run.fold(last);
          texts.render(run);
          const said = [...document.querySelectorAll(".message .said")];
          return [[before, carets()], said.map((one) => one.textContent)];
        }""",
        [[*lines, token | {"type": "message", "data": calls}], last],
    )

    assert carets == [['"▍"', "none"], ["none", "none"]]
    assert texts == ["a calm ending", '→ look({"up":1})']


def test_what_a_field_is_and_what_it_begins_with_are_two_sentences(opening: Opening) -> None:
    page = opening("/#/graphs/order")
    form = form_of(page)

    expect(form).to_contain_text('When it is fetched. "monday" unless said.')
    expect(form).to_contain_text("Is it one? false unless said.")


def test_fifty_thousand_lines_are_walked_through_with_the_keyboard(
    server: Server, opening: Opening
) -> None:
    run_id = server.submit("talkative", "t", input={"seen": [], "size": 50_000})
    last = server.wait_line(run_id, "run.completed")["seq"]
    page = opening(f"/#/runs/{run_id}")
    page.locator(f"#line-{last}").wait_for()
    lines = page.get_by_role("listbox", name="Lines")
    for key, seq in (("Home", 1), ("ArrowDown", 2), ("End", last), ("ArrowUp", last - 1)):
        lines.press(key)
        expect(lines).to_have_attribute("aria-activedescendant", f"line-{seq}")
        expect(page.locator(f"#line-{seq}")).to_be_in_viewport()

    assert page.locator(".line").count() < 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_forms(
    server: Server, opening: Opening, picture: Picture, scheme: str
) -> None:
    page = opening("/#/graphs/order", color_scheme=scheme)
    form_of(page).get_by_label("Kind of Pet").select_option("Dog")
    for name in ("Tags", "Stock"):
        group = form_of(page).get_by_role("group", name=name)
        group.get_by_role("button", name="Add").click()
    form_of(page).get_by_label("Amount").fill("99")
    page.get_by_text("More", exact=True).click()
    found = axe(page)
    picture(page, f"form-{scheme}")
    run_id = server.submit("asking_two", "t", input={})
    server.wait_line(run_id, "run.interrupted")
    page.goto(f"{server.url}/#/runs/{run_id}")
    page.get_by_role("button", name="Answer all").click()
    found += axe(page)
    picture(page, f"questions-{scheme}")

    assert found == []


def test_forms_do_not_scroll_sideways(server: Server, opening: Opening) -> None:
    page = opening("/#/graphs/order", viewport={"width": 390, "height": 844})
    page.locator("#json").fill(json.dumps(ORDER))
    page.get_by_text("More", exact=True).click()
    widths = [page.evaluate("document.documentElement.scrollWidth")]
    run_id = server.submit("asking_two", "t", input={})
    server.wait_line(run_id, "run.interrupted")
    page.goto(f"{server.url}/#/runs/{run_id}")
    expect(page.locator(".asks")).to_be_visible()
    widths.append(page.evaluate("document.documentElement.scrollWidth"))

    assert widths == [390, 390]


def test_a_run_that_is_not_there_shows_nothing_of_one(opening: Opening) -> None:
    page = opening("/#/runs/nonsense")
    expect(page.locator(".link")).to_contain_text("run 'nonsense' not found")

    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.get_by_text("Waterfall")).to_be_hidden()


def test_hundreds_of_runs_are_listed_a_page_at_a_time(server: Server, opening: Opening) -> None:
    ids = [server.submit("greeting", f"t{n}", context={"user": "a"}) for n in range(70)]
    asking = server.submit("judging", "t", input={})
    server.wait_line(asking, "run.interrupted")
    until(lambda: not server.get("/v1/runs", status="pending").json()["runs"], "all have run")
    page = opening()
    runs = page.locator("#runs li")
    expect(runs).to_have_count(30)
    expect(page.locator(f"#runs a[href='#/runs/{asking}']")).to_contain_text("needs an answer")
    page.get_by_role("button", name="Older runs").click()
    expect(runs).to_have_count(60)
    page.get_by_role("button", name="Older runs").click()
    expect(runs).to_have_count(71)
    expect(page.get_by_role("button", name="Older runs")).to_be_hidden()
    assert runs.last.locator("a").get_attribute("href") == f"#/runs/{ids[0]}"
    page.get_by_label("Graph of the runs").select_option("judging")
    expect(runs).to_have_count(1)
    page.get_by_label("Status of the runs").select_option("error")
    expect(page.get_by_text("No run is like that.")).to_be_visible()
    page.get_by_label("Status of the runs").select_option("")
    server.resume("t", {"approved": True})

    expect(runs).to_have_count(2, timeout=20_000)
    expect(page.locator(f"#runs a[href='#/runs/{asking}']")).to_contain_text("interrupted")


# A server that is not there, or is another one.


def test_the_page_waits_for_a_server(server: Server, opening: Opening) -> None:
    page = opening()
    page.route("**/info", lambda route: route.abort(), times=1)
    page.reload()

    expect(page.get_by_role("heading", name="There is no server")).to_be_visible()
    expect(page.get_by_role("heading", name="New run")).to_be_visible()


def test_a_page_without_graphs_says_how_to_serve_one(opening: Opening) -> None:
    page = opening()
    answer = {"graphs": [], "failures": {"broken": "no module named 'x'"}}
    page.route("**/v1/graphs", lambda route: route.fulfill(json=answer))
    page.reload()

    expect(page.get_by_role("heading", name="No graph is served")).to_be_visible()
    expect(page.locator("main")).to_contain_text("broken: no module named 'x'")


@pytest.mark.parametrize("path", ["**/info", "**/v1/graphs/*/schema"])
def test_a_page_of_somebody_else_is_not_taken_for_an_answer(opening: Opening, path: str) -> None:
    page = opening()
    page.route(path, lambda route: route.fulfill(body="<h1>Log in</h1>", content_type="text/html"))
    page.reload()

    expect(page.get_by_role("alert")).to_contain_text("What answered is not Sereno")


def ended(server: Server) -> str:
    run_id = server.submit("judging", "t", input={})
    server.wait_line(run_id, "run.interrupted")
    return run_id


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"status": 200, "body": "<h1>Log in</h1>", "content_type": "text/html"}, "not Sereno"),
        ({"status": 404, "json": {"detail": "run 'x' not found"}}, "run 'x' not found"),
        ({"status": 410, "json": {"detail": "it was deleted"}}, "it was deleted"),
        ({"status": 403, "body": "no"}, "the server answered 403"),
    ],
    ids=["HTML", "404", "410", "403"],
)
def test_a_stream_that_is_refused_is_not_asked_for_again(
    server: Server, opening: Opening, answer: dict[str, Any], told: str
) -> None:
    run_id = ended(server)
    page = opening()
    asked_for = []

    def refuse(route: Any) -> None:
        asked_for.append(route.request.url)
        route.fulfill(**answer)

    page.route("**/stream?*", refuse)
    page.goto(f"{server.url}/#/runs/{run_id}")
    expect(page.locator(".link")).to_contain_text(told)
    page.wait_for_timeout(800)

    assert len(asked_for) == 1


@pytest.mark.parametrize(
    ("status", "headers", "at_least_s"),
    [(429, {"Retry-After": "2"}, 1.9), (502, {}, 0.2), (503, {"Retry-After": "2"}, 1.9)],
)
def test_a_stream_that_is_put_off_is_asked_for_again(
    server: Server, opening: Opening, status: int, headers: dict[str, str], at_least_s: float
) -> None:
    run_id = ended(server)
    page = opening()
    page.route(
        "**/stream?*",
        lambda route: route.fulfill(status=status, headers=headers, body="<h1>Busy</h1>"),
        times=1,
    )
    page.evaluate("() => { window.began = performance.now(); }")
    page.evaluate("(id) => { location.hash = `#/runs/${id}`; }", run_id)
    expect(page.locator(".link")).to_contain_text("were read")
    took = page.evaluate("performance.now() - began") / 1000

    assert took >= at_least_s


def test_another_log_takes_the_place_of_the_one_that_was_read(
    server: Server, opening: Opening
) -> None:
    """As after a restore: the lines that were read are not the store's any more."""
    run_id = ended(server)
    raw = server.raw(run_id)
    other = raw.replace(b"judge", b"JUDGE")
    page = opening()
    answers = iter([("one", raw[: len(raw) * 2 // 3]), ("two", other), ("two", other)])

    def answer(route: Any) -> None:
        log_id, body = next(answers)
        headers = {"X-Log-Id": log_id, "Content-Type": "application/x-ndjson"}
        route.fulfill(headers=headers, body=body)

    page.route("**/stream?*", answer)
    page.goto(f"{server.url}/#/runs/{run_id}")
    expect(page.locator(".link")).to_contain_text("were read")
    text = copied(page, "Copy the lines")

    assert "judge" not in text
    assert [json.loads(line)["seq"] for line in text.splitlines()] == [
        line["seq"] for line in server.lines(run_id)
    ]
