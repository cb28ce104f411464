from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import threading
import types
import uuid
from array import array
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langgraph.types import Command, Interrupt, Send
from pydantic import BaseModel, ConfigDict, Field, RootModel, SecretStr

from telemetry.encoding import JsonEncoder, escape_line_breaks

quick = settings(max_examples=100, deadline=None)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=5)
    ),
    max_leaves=30,
)
any_text = st.text(st.characters() | st.sampled_from("\ud800\udfff\u2028\u2029\x85\r\n\x0b\x1c\0"))


class Colour(enum.Enum):
    RED = "red"
    ODD = (1, b"x")


class Size(enum.StrEnum):
    SMALL = "small"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: int
    where: object = None
    _private: int = 0


@dataclasses.dataclass(slots=True)
class Slotted:
    here: int
    unset: int = dataclasses.field(init=False)


class UndecoratedPoint(Point):
    pass


class Pair(NamedTuple):
    left: int
    right: object


class Person(BaseModel):
    name: str
    born: datetime.date
    friend: Person | None = None
    token: SecretStr = SecretStr("secret")
    password: str = Field(default="secret", exclude=True)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Tags(RootModel[list[str]]):
    pass


class Anything(RootModel[Any]):
    pass


class V1Model:
    """What a pydantic v1 model looks like from outside."""

    __fields__ = {"a": object(), "b": object()}  # noqa: RUF012

    def __init__(self) -> None:
        self.a, self.b, self.cached = 1, {2}, "not a field"


class FakeArray:
    """What an array of numpy or torch looks like from outside."""

    def __init__(self, *numbers: float, shape: tuple[int, ...] | None = None) -> None:
        self.numbers = numbers
        self.shape = (len(numbers),) if shape is None else shape

    def tolist(self) -> object:
        return list(self.numbers) if self.shape else self.numbers[0]

    def __repr__(self) -> str:
        return "array(…)"


class Plain:
    def __repr__(self) -> str:
        return "<plain>"


class LongRepr:
    def __repr__(self) -> str:
        return "x" * 10_000


class SurrogateRepr:
    def __repr__(self) -> str:
        return "\ud800"


def refuse(*args: object, **kwargs: object) -> Any:
    raise RuntimeError("hostile")


HOSTILE = {
    name: refuse
    for name in (
        "__repr__ __str__ __iter__ __len__ __bool__ __eq__ __getitem__ __contains__ "
        "__int__ __index__ __float__ __format__ __getattr__ __getattribute__ keys items values "
        "copy encode isascii isoformat tolist"
    ).split()
} | {"__hash__": lambda self: 1, "__class__": property(refuse)}


def hostile(base: type) -> Any:
    return type(f"Hostile{base.__name__.title()}", (base,), HOSTILE)


class HostileMeta(type):
    __hash__ = refuse
    __mro__ = property(refuse)
    __getattribute__ = refuse
    __instancecheck__ = refuse
    __subclasscheck__ = refuse


class OfHostileMeta(metaclass=HostileMeta):
    pass


class Unprintable(Exception):
    __str__ = refuse


class EndlessArray:
    def tolist(self) -> object:
        return EndlessArray()


class Branching:
    def tolist(self) -> object:
        return [Branching() for _ in range(1000)]


def encoded(value: object) -> Any:
    """The value a client reads, having checked that it came as one line."""
    line = JsonEncoder().encode(value)
    text = line.decode()

    assert len(text.splitlines()) == 1
    return json.loads(text, parse_constant=refuse)


@quick
@given(json_values)
def test_any_json_value_reads_back_as_itself(value: object) -> None:
    encoder = JsonEncoder()

    assert json.loads(encoder.encode(value)) == value
    assert encoder.fallbacks == 0


@quick
@given(any_text)
def test_any_text_is_one_line_and_loses_only_lone_surrogates(text: str) -> None:
    read = encoded({text: [text]})

    expected = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert read == {expected: [expected]}


def odd_keys(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = (
        any_text
        | st.integers()
        | st.floats()
        | st.none()
        | st.booleans()
        | st.binary()
        | st.sampled_from(Colour)
        | st.tuples(st.integers(), any_text)
        | st.frozensets(st.integers(), max_size=2)
        | st.dates()
        | st.builds(Plain)
    )
    return st.dictionaries(keys, inner, max_size=4)


# Hypothesis looks at what it draws: what does not bear that comes in a list.
odd_values = st.recursive(
    st.none()
    | any_text
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.binary()
    | st.decimals()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.timedeltas()
    | st.uuids()
    | st.sampled_from([*Colour, Size.SMALL, Level.HIGH, Plain, len, Ellipsis, NotImplemented])
    | st.builds(Plain)
    | st.builds(SurrogateRepr)
    | st.builds(Unprintable)
    | st.none().map(lambda _: [OfHostileMeta()])
    | st.sampled_from([str, bytes, list, dict, set, deque, object]).map(lambda c: [hostile(c)()]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4).map(deque)
        | odd_keys(inner)
        | odd_keys(inner).map(UserDict)
        | odd_keys(inner).map(types.MappingProxyType)
        | st.builds(Point, st.integers(), inner)
        | st.builds(Pair, st.integers(), inner)
        | st.builds(AIMessage, st.just("hi"), additional_kwargs=odd_keys(inner))
        | st.builds(ValueError, inner)
        | inner.map(lambda value: FakeArray(value))
    ),
    max_leaves=20,
)


@quick
@given(odd_values)
def test_any_nest_of_odd_objects_is_a_line_of_json(value: object) -> None:
    encoded(value)


UTC = datetime.UTC


@pytest.mark.parametrize(
    ("value", "read"),
    [
        pytest.param(math.nan, None, id="nan"),
        pytest.param([math.inf, -math.inf], [None, None], id="infinity"),
        pytest.param([2**64 - 1, -(2**63)], [2**64 - 1, -(2**63)], id="64-bit-integers"),
        pytest.param([2**64, -(2**63) - 1], [str(2**64), str(-(2**63) - 1)], id="big-integers"),
        pytest.param(10**5000, hex(10**5000), id="integer-too-long-to-print"),
        pytest.param("a\ud800b", "a\ufffdb", id="lone-surrogate"),
        pytest.param("\ud83d\ude00", "😀", id="split-surrogate-pair"),
        pytest.param("a\0b", "a\0b", id="nul"),
        pytest.param(b"\x00\xff", "AP8=", id="bytes"),
        pytest.param(bytearray(b"hi"), "aGk=", id="bytearray"),
        pytest.param(memoryview(b"hiho")[::2], "aGg=", id="memoryview"),
        pytest.param((1, (2,)), [1, [2]], id="tuple"),
        pytest.param(Pair(1, b"hi"), [1, "aGk="], id="namedtuple"),
        pytest.param(namedtuple("Old", "a")(1), [1], id="collections.namedtuple"),
        pytest.param({1}, [1], id="set"),
        pytest.param(frozenset({"a"}), ["a"], id="frozenset"),
        pytest.param(deque([1, {2}]), [1, [2]], id="deque"),
        pytest.param([{"a": 1}.keys(), {"a": 1}.values()], [["a"], [1]], id="dict-views"),
        pytest.param({"a": 1}.items(), [["a", 1]], id="dict-items"),
        pytest.param(OrderedDict(a=1), {"a": 1}, id="ordereddict"),
        pytest.param(defaultdict(list, a=[1]), {"a": [1]}, id="defaultdict"),
        pytest.param(UserDict(a={1}), {"a": [1]}, id="userdict"),
        pytest.param(types.MappingProxyType({"a": 1}), {"a": 1}, id="mappingproxy"),
        pytest.param(Colour.RED, "red", id="enum"),
        pytest.param(Colour.ODD, [1, "eA=="], id="enum-of-odd-value"),
        pytest.param([Size.SMALL, Level.HIGH], ["small", 3], id="str-and-int-enum"),
        pytest.param(datetime.datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05", id="datetime"),
        pytest.param(
            datetime.datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00", id="utc"
        ),
        pytest.param(datetime.date(2026, 1, 2), "2026-01-02", id="date"),
        pytest.param(datetime.time(3, 4), "03:04:00", id="time"),
        pytest.param(datetime.timedelta(minutes=1), 60.0, id="timedelta"),
        pytest.param(uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001", id="uuid"),
        pytest.param(decimal.Decimal("1.20"), "1.20", id="decimal"),
        pytest.param(pathlib.PurePosixPath("/a/b"), "/a/b", id="path"),
        pytest.param(Point(1, {2}), {"x": 1, "where": [2]}, id="dataclass"),
        pytest.param(UndecoratedPoint(1), {"x": 1, "where": None}, id="dataclass-subclass"),
        pytest.param(Slotted(1), {"here": 1}, id="dataclass-with-an-unset-slot"),
        pytest.param(Open(a=1, b={2}), {"a": 1, "b": [2]}, id="pydantic-extra"),  # type: ignore[call-arg]
        pytest.param(Tags(["a"]), ["a"], id="pydantic-root-model"),
        pytest.param(V1Model(), {"a": 1, "b": [2]}, id="pydantic-v1"),
        pytest.param(FakeArray(1, 2), [1, 2], id="array"),
        pytest.param(FakeArray(1.5, shape=()), 1.5, id="array-scalar"),
        pytest.param(array("i", [1, 2]), [1, 2], id="array.array"),
        pytest.param(ValueError("no"), {"$type": "ValueError", "message": "no"}, id="exception"),
        pytest.param(
            json.JSONDecodeError("no", "", 0),
            {"$type": "json.decoder.JSONDecodeError", "message": "no: line 1 column 1 (char 0)"},
            id="exception-of-a-module",
        ),
        pytest.param(
            asyncio.CancelledError(),
            {"$type": "asyncio.exceptions.CancelledError", "message": ""},
            id="base-exception",
        ),
    ],
)
def test_a_value_has_its_form_in_json(value: object, read: object) -> None:
    assert encoded(value) == read
    assert encoded({"in": [value]}) == {"in": [read]}


@pytest.mark.parametrize(
    ("key", "read"),
    [
        pytest.param(None, "null", id="none"),
        pytest.param(True, "true", id="bool"),
        pytest.param(1, "1", id="int"),
        pytest.param(2**70, str(2**70), id="big-int"),
        pytest.param(1.5, "1.5", id="float"),
        pytest.param(math.nan, "null", id="nan"),
        pytest.param((1, "a"), '[1,"a"]', id="tuple"),
        pytest.param(("\ud800",), '["\ufffd"]', id="tuple-of-a-surrogate"),
        pytest.param(b"hi", "aGk=", id="bytes"),
        pytest.param(Colour.RED, "red", id="enum"),
        pytest.param(Size.SMALL, "small", id="str-enum"),
        pytest.param(datetime.date(2026, 1, 2), "2026-01-02", id="date"),
        pytest.param("\ud800", "\ufffd", id="surrogate"),
        pytest.param(
            Plain(), f'{{"$type":"{__name__}.Plain","$repr":"<plain>"}}', id="unknown-object"
        ),
    ],
)
def test_an_odd_key_is_the_json_text_of_its_value(key: object, read: str) -> None:
    assert encoded({key: b"hi"}) == {read: "aGk="}


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        pytest.param(Plain(), f"{__name__}.Plain", "<plain>", id="object"),
        pytest.param(Plain, "type", f"<class '{__name__}.Plain'>", id="class"),
        pytest.param(Point, "type", f"<class '{__name__}.Point'>", id="dataclass-itself"),
        pytest.param(Person, None, f"<class '{__name__}.Person'>", id="model-itself"),
        pytest.param(len, "builtin_function_or_method", "<built-in function len>", id="function"),
        pytest.param(1j, "complex", "1j", id="complex"),
        pytest.param(range(3), "range", "range(0, 3)", id="range"),
        pytest.param(LongRepr(), f"{__name__}.LongRepr", "x" * 200, id="long-repr"),
        pytest.param(SurrogateRepr(), f"{__name__}.SurrogateRepr", "\ufffd", id="surrogate-repr"),
        pytest.param(FakeArray(shape=(200, 200)), f"{__name__}.FakeArray", "array(…)", id="matrix"),
        pytest.param(
            hostile(object)(), f"{__name__}.HostileObject", "<unprintable>", id="raising-repr"
        ),
        pytest.param(Unprintable(), f"{__name__}.Unprintable", None, id="raising-message"),
        pytest.param(threading.Lock(), "_thread.lock", None, id="lock"),
    ],
)
def test_an_unknown_object_is_shown_and_counted(
    value: object, kind: str | None, shown: str | None
) -> None:
    encoder = JsonEncoder()

    read = json.loads(encoder.encode({"a": 1, "b": value}))

    assert read["a"] == 1
    assert read["b"].keys() == {"$type", "$repr"}
    assert kind is None or read["b"]["$type"] == kind
    assert shown is None or read["b"]["$repr"] == shown
    assert encoder.fallbacks >= 1


@pytest.mark.parametrize(
    ("base", "args", "read"),
    [
        pytest.param(str, ("text",), "text", id="str"),
        pytest.param(int, (7,), 7, id="int"),
        pytest.param(float, (1.5,), 1.5, id="float"),
        pytest.param(dict, ({"a": 1},), {"a": 1}, id="dict"),
        pytest.param(list, ([1],), [1], id="list"),
        pytest.param(tuple, ([1],), [1], id="tuple"),
        pytest.param(set, ([1],), [1], id="set"),
        pytest.param(frozenset, ([1],), [1], id="frozenset"),
        pytest.param(deque, ([1],), [1], id="deque"),
        pytest.param(datetime.date, (2026, 1, 2), "2026-01-02", id="date"),
    ],
)
def test_a_hostile_subclass_is_read_as_its_base(
    base: type, args: tuple[object, ...], read: object
) -> None:
    assert encoded([hostile(base)(*args)]) == [read]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(OfHostileMeta(), id="instance-of-a-hostile-metaclass"),
        pytest.param(OfHostileMeta, id="class-of-a-hostile-metaclass"),
        pytest.param({"a": [OfHostileMeta()]}, id="nested"),
        pytest.param({hostile(str)("k"): 1}, id="hostile-key"),
        pytest.param(hostile(BaseModel).model_construct(), id="model"),
        pytest.param(hostile(ValueError)("no"), id="exception"),
        pytest.param(BaseModel.__new__(Person), id="model-without-init"),
        pytest.param(AIMessage.__new__(AIMessage), id="message-without-init"),
        pytest.param(Interrupt.__new__(Interrupt), id="interrupt-without-init"),
        pytest.param(EndlessArray(), id="unfolds-for-ever"),
        pytest.param(Branching(), id="unfolds-a-thousandfold"),
        pytest.param({"a": (n for n in "abc")}, id="generator"),
    ],
)
def test_whatever_is_in_the_state_makes_a_line(value: object) -> None:
    encoded(value)


def test_a_generator_is_not_consumed() -> None:
    generator = iter([1, 2])

    encoded({"g": generator})

    assert list(generator) == [1, 2]


@pytest.mark.parametrize(
    "holder",
    [
        pytest.param(lambda held: held, id="itself"),
        pytest.param(lambda held: [held], id="list"),
        pytest.param(Anything, id="root-model"),
        pytest.param(lambda held: enum.Enum("Held", {"IT": held}).IT, id="enum"),
        pytest.param(lambda held: FakeArray(held, shape=()), id="array-scalar"),
        pytest.param(UserDict, id="mapping"),
        pytest.param(lambda held: HumanMessage("hi", additional_kwargs=held), id="message"),
        pytest.param(lambda held: Point(1, held), id="dataclass"),
    ],
)
def test_the_state_is_left_as_it_was(holder: Any) -> None:
    held = {"set": {1}, "list": [{2}], 3: Colour.RED}

    JsonEncoder().encode(holder(held))

    assert held == {"set": {1}, "list": [{2}], 3: Colour.RED}


def test_a_cycle_is_cut_where_it_closes() -> None:
    dictionary: dict[str, object] = {"a": 1}
    dictionary["self"] = [dictionary]
    point = Point(1)
    point.where = {"point": point}

    assert encoded(dictionary) == {"a": 1, "self": [{"$type": "dict", "$cut": "cycle"}]}
    assert encoded(point)["where"]["point"] == {"$type": f"{__name__}.Point", "$cut": "cycle"}


def test_a_value_met_twice_is_no_cycle() -> None:
    shared = [1]

    assert encoded([shared, shared, {"again": shared}]) == [[1], [1], {"again": [1]}]


def test_what_nests_too_deep_is_cut() -> None:
    nested: object = "bottom"
    for _ in range(50_000):
        nested = [nested]

    line = JsonEncoder().encode({"deep": nested, "b": 1})

    assert b'{"$type":"list","$cut":"depth"}' in line
    assert json.loads(line)["b"] == 1


def test_a_value_of_too_many_nodes_is_cut_not_unfolded() -> None:
    doubled: object = [1]
    for _ in range(40):  # 2**40 leaves, were they written out
        doubled = [doubled, doubled]
    encoder = JsonEncoder()

    line = encoder.encode({"doubled": [0] * 1_000_001, "b": 1})
    assert json.loads(line) == {"doubled": {"$type": "list", "$cut": "size"}, "b": 1}
    encoder.encode(doubled)
    assert encoder.fallbacks > 1


def test_no_stack_left_still_makes_a_line() -> None:
    def deeper() -> bytes:
        try:
            return deeper()
        except RecursionError:
            return JsonEncoder().encode([[[Plain()]]])

    json.loads(deeper())


def test_fallbacks_count_the_values_that_lost_something() -> None:
    encoder = JsonEncoder()

    encoder.encode({"fine": [1, b"x", {2}, 2**70], "shown": Plain()})
    assert encoder.fallbacks == 1
    encoder.encode(["mended \ud800", {"\udfff": 2**70}])
    assert encoder.fallbacks == 3


def test_a_message_is_its_fields_that_are_set() -> None:
    message = AIMessage(
        "hi",
        id="m1",
        tool_calls=[{"name": "search", "args": {"when": datetime.date(2026, 1, 2)}, "id": "c1"}],
        usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
        response_metadata={"raw": b"hi"},
    )

    assert encoded({"messages": [message]}) == {
        "messages": [
            {
                "content": "hi",
                "additional_kwargs": {},
                "response_metadata": {"raw": "aGk="},
                "type": "ai",
                "id": "m1",
                "tool_calls": [
                    {
                        "name": "search",
                        "args": {"when": "2026-01-02"},
                        "id": "c1",
                        "type": "tool_call",
                    }
                ],
                "invalid_tool_calls": [],
                "usage_metadata": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
            }
        ]
    }


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        pytest.param(HumanMessage("hi", extra=1), {"type": "human", "extra": 1}, id="human"),
        pytest.param(AIMessageChunk("to"), {"type": "AIMessageChunk", "content": "to"}, id="chunk"),
        pytest.param(
            ToolMessage("r", tool_call_id="c1", artifact={1}),
            {"type": "tool", "tool_call_id": "c1", "status": "success", "artifact": [1]},
            id="tool",
        ),
    ],
)
def test_every_kind_of_message_keeps_its_own_fields(
    message: object, fields: dict[str, Any]
) -> None:
    read = encoded(message)

    assert read | fields == read
    assert None not in read.values()


def test_a_model_gives_its_fields_but_not_its_secrets() -> None:
    friend = Person(name="Bo", born=datetime.date(2000, 1, 2))
    read = encoded(Person(name="Al", born=datetime.date(2001, 1, 2), friend=friend))

    assert read["name"] == "Al"
    assert read["friend"]["born"] == "2000-01-02"
    assert read["token"] == {
        "$type": "pydantic.types.SecretStr",
        "$repr": "SecretStr('**********')",
    }
    assert "password" not in read


def test_what_langgraph_nodes_return_gives_its_public_fields() -> None:
    read = encoded(
        {
            "interrupt": Interrupt({"ask": {1}}, id="i1"),
            "command": Command(goto=[Send("node", {"arg": b"hi"})], update={"a": {1}}),
        }
    )

    assert read["interrupt"].items() >= {"value": {"ask": [1]}, "id": "i1"}.items()
    assert read["command"]["goto"] == [{"node": "node", "arg": {"arg": "aGk="}}]
    assert read["command"]["update"] == {"a": [1]}


def test_base64_reads_back() -> None:
    assert base64.b64decode(encoded(bytes(range(256)))) == bytes(range(256))


def test_line_breaks_are_escaped_and_other_text_is_left() -> None:
    assert escape_line_breaks("é\u2028\u2029\x85…".encode()) == (
        "é".encode() + rb"\u2028\u2029\u0085" + "…".encode()
    )


class Meddler:
    """Empties what holds it while it is being encoded, as another thread would."""

    def __init__(self, *held: Any) -> None:
        self.held = held

    def __repr__(self) -> str:
        for container in self.held:
            container.clear()
        return "meddler"


def test_a_container_emptied_during_encoding_does_no_harm() -> None:
    """orjson with a `default` hook dies of a segmentation fault here."""
    inner: list[Any] = [["a" * n] for n in range(1000)]
    outer: dict[str, Any] = {"inner": inner}
    numbers = {1, 2}
    inner.insert(0, Meddler(inner, outer, numbers))
    outer["numbers"] = numbers

    read = encoded(outer)

    assert len(read["inner"]) == 1001
    assert read["inner"][-1] == ["a" * 999]


def test_a_state_other_threads_write_to_is_always_a_line() -> None:
    state: dict[str, Any] = {"messages": [], "by_id": {}, "seen": set(), "queue": deque()}
    done = threading.Event()

    def write() -> None:
        n = 0
        while not done.is_set():
            n += 1
            state["messages"].append(AIMessage.model_construct(content=str(n), kind=Colour.RED))
            state["by_id"][n] = [Size.SMALL, {n}]
            state["seen"].add(n)
            state["queue"].append((n,))
            state[f"key{n % 50}"] = Point(n)
            if n % 40 == 0:
                for container in ("messages", "by_id", "seen", "queue"):
                    state[container].clear()
            state.pop(f"key{(n + 25) % 50}", None)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        reads = [encoded(state) for _ in range(200)]
    finally:
        done.set()
        for writer in writers:
            writer.join()

    assert all(read.keys() >= {"messages", "by_id", "seen", "queue"} for read in reads)


def test_one_encoder_counts_for_all_threads() -> None:
    encoder = JsonEncoder()
    threads = [
        threading.Thread(target=lambda: [encoder.encode(Plain()) for _ in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert encoder.fallbacks == 800
