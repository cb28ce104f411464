"""Turns any Python value into one line of JSON, and never raises.

A graph's state holds whatever its nodes put there, so every value has an answer:

    None, bool, str, float     themselves; NaN and infinity are null, a lone surrogate is U+FFFD
    int                        itself; beyond 64 bits its digits as a string (hex beyond 4300)
    bytes                      a base64 string
    list, tuple, set, deque    an array
    dict, Mapping              an object; a key that is not text becomes the JSON text of its value
    enum                       its value
    datetime, date, time       ISO 8601; a timedelta is its seconds
    UUID, Decimal, Path        text
    message, model, dataclass  an object of its fields; a message without those that are None
    array, tensor              nested arrays, up to 10 000 numbers
    exception                  {"$type": "ValueError", "message": "…"}
    anything else              {"$type": "module.Class", "$repr": "…"}
    what cannot be followed    {"$type": "dict", "$cut": "cycle"}; also "depth" and "size"

The value is copied first and orjson sees only the copy. orjson reads containers without holding
them: when one shrinks while a `default` hook (or an enum's `value`) lets another thread run, the
process dies of a segmentation fault, and nodes do keep writing to the state we encode.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import functools
import itertools
import math
import pathlib
import threading
import uuid
from collections import deque
from collections.abc import Callable, ItemsView, KeysView, Mapping, ValuesView
from typing import Any

import orjson

__all__ = ["JsonEncoder", "escape_line_breaks"]

_DEEPEST = 200  # orjson refuses more than 254 levels
_MOST_NODES = 1_000_000
_MOST_NUMBERS = 10_000
_LONGEST_REPR = 200
_LONGEST_MESSAGE = 2_000
_ATOMS = frozenset({type(None), bool, int, float, str})
_LAST_RESORT = b'{"$type":"object","$repr":"<not encodable>"}'


class JsonEncoder:
    """Encodes values as single lines of UTF-8 JSON; one encoder serves every thread."""

    #: Values that lost something: shown by their repr, cut, or mended text.
    fallbacks: int

    def __init__(self) -> None:
        self.fallbacks = 0
        self._counting = threading.Lock()

    def encode(self, value: object) -> bytes:
        """One line of JSON, without its newline, for any value.

        Only KeyboardInterrupt, SystemExit and their like pass through.
        """
        copy = _Copy()
        try:
            line = _dumped(copy.plain(value, 0), copy)
        except Exception:  # for example no stack left to copy on
            copy.lost += 1
            line = _LAST_RESORT
        if copy.lost:
            with self._counting:
                self.fallbacks += copy.lost
        return escape_line_breaks(line)


def escape_line_breaks(data: bytes) -> bytes:
    """Escape the three characters JSON may hold raw and line readers (httpx) split at."""
    if data.isascii():
        return data
    for raw, escaped in _LINE_BREAKS:
        if raw in data:
            data = data.replace(raw, escaped)
    return data


_LINE_BREAKS = (
    ("\u2028".encode(), rb"\u2028"),
    ("\u2029".encode(), rb"\u2029"),
    ("\u0085".encode(), rb"\u0085"),
)


def _dumped(plain: object, copy: _Copy) -> bytes:
    try:
        return orjson.dumps(plain)
    except orjson.JSONEncodeError:  # a lone surrogate, or an integer of more than 64 bits
        return orjson.dumps(_mended(plain, copy))


class _Copy:
    """Copies one value into exact dicts and lists that nobody else holds."""

    __slots__ = ("left", "lost", "path")

    def __init__(self) -> None:
        self.left = _MOST_NODES
        self.lost = 0
        self.path: set[int] = set()

    def plain(self, value: Any, depth: int) -> object:
        kind: type = type(value)
        if kind in _ATOMS:
            return value
        if (kind is dict or kind is list) and not value:
            return kind()
        here = id(value)
        if here in self.path:
            return self._cut(kind, "cycle")
        if depth > _DEEPEST:
            return self._cut(kind, "depth")
        self.path.add(here)
        try:
            if kind is dict:
                return self._object(value.copy(), depth + 1)
            if kind is list or kind is tuple:
                return self._array(list(value), depth + 1)
            read = _reader(kind)
            if read is None:
                return self._shown(value)
            step = read(value)
            if type(step) is dict:  # sparing the most common step a round
                return self._object(step.copy(), depth + 1)
            return self.plain(step, depth + 1)
        except _TooLargeError:
            return self._cut(kind, "size")
        except Exception:  # a hostile method, or no stack left
            return self._shown(value)
        finally:
            self.path.discard(here)

    # Both work in place, as every event passes here: `items` must be ours already.

    def _object(self, items: dict[Any, Any], depth: int) -> object:
        self.left -= len(items)
        if self.left < 0:
            raise _TooLargeError
        odd = False
        for key, item in items.items():
            if type(item) not in _ATOMS:
                items[key] = self.plain(item, depth)
            if type(key) is not str:
                odd = True
        return {self._key(key, depth): item for key, item in items.items()} if odd else items

    def _array(self, items: list[Any], depth: int) -> object:
        self.left -= len(items)
        if self.left < 0:
            raise _TooLargeError
        if not _ATOMS.issuperset(map(type, items)):
            for place, item in enumerate(items):
                items[place] = self.plain(item, depth)
        return items

    def _key(self, key: object, depth: int) -> str:
        plain = _mended(self.plain(key, depth), self)
        return plain if isinstance(plain, str) else orjson.dumps(plain).decode()

    def _shown(self, value: object) -> dict[str, object]:
        self.lost += 1
        try:
            # str.__str__ because a repr may be a subclass of str with methods of its own.
            text = str.__str__(repr(value))[:_LONGEST_REPR]
        except Exception:
            text = "<unprintable>"
        return {"$type": _name(type(value)), "$repr": text}

    def _cut(self, kind: type, why: str) -> dict[str, object]:
        self.lost += 1
        return {"$type": _name(kind), "$cut": why}


class _TooLargeError(Exception):
    """The copy has no room for a container's items."""


def _mended(plain: Any, copy: _Copy) -> object:
    """A copy with the text and the integers orjson refuses replaced by what it takes."""
    kind = type(plain)
    if kind is dict:
        return {_mended(key, copy): _mended(item, copy) for key, item in plain.items()}
    if kind is list:
        return [_mended(item, copy) for item in plain]
    if kind is int and not -(2**63) <= plain < 2**64:
        return _digits(plain)
    if kind is str and not plain.isascii():
        # By way of UTF-16 a high and a low surrogate side by side become their character.
        mended = plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        copy.lost += mended != plain
        return mended
    return plain


def _digits(number: int) -> str:
    try:
        return str(number)
    except ValueError:  # more digits than sys.get_int_max_str_digits()
        return hex(number)


def _name(kind: type) -> str:
    return _qualified(kind).removeprefix("builtins.")


def _qualified(kind: type) -> str:
    try:
        return f"{kind.__module__}.{kind.__qualname__}"
    except Exception:  # a metaclass may answer anything
        return "object"


_Read = Callable[[Any], object]


@functools.lru_cache(maxsize=2048)
def _reader(kind: type) -> _Read | None:
    """How to take one step from an instance of `kind` towards JSON; None when nobody knows.

    A reader may return anything, even live state: the copy goes on from there. It may raise: the
    value is shown.
    """
    for base, read in _BY_CLASS:
        if issubclass(kind, base):
            return read
    # Classes of optional or heavy packages: an instance can only exist once its module is loaded.
    for name in map(_qualified, kind.__mro__):
        if name in _BY_NAME:
            return _BY_NAME[name]
    if hasattr(kind, "__dataclass_fields__"):
        names = [field.name for field in dataclasses.fields(kind)]
        return _fields_reader([name for name in names if not name.startswith("_")])
    if hasattr(kind, "__pydantic_fields__"):
        return _model_reader(kind.__pydantic_fields__)
    if isinstance(getattr(kind, "__fields__", None), dict):  # pydantic v1
        return _model_reader(kind.__fields__)  # type: ignore[attr-defined]
    if hasattr(kind, "tolist"):
        return _numbers
    if issubclass(kind, Mapping):
        return _mapping
    return None


def _fields_reader(names: list[str]) -> _Read:
    return lambda value: {name: getattr(value, name) for name in names if hasattr(value, name)}


def _model_reader(fields: dict[str, Any]) -> _Read:
    """Reads a pydantic model's fields, without those its author excluded."""
    names = [
        name
        for name, field in fields.items()
        if not getattr(getattr(field, "field_info", field), "exclude", None)
    ]

    def read(value: Any) -> object:
        held = value.__dict__
        return {name: held[name] for name in names if name in held} | _extra(value)

    return read


def _message(value: Any) -> object:
    fields = {name: item for name, item in value.__dict__.copy().items() if item is not None}
    return fields | extra if (extra := _extra(value)) else fields


def _extra(model: object) -> dict[str, object]:
    return getattr(model, "__pydantic_extra__", None) or {}


def _numbers(value: Any) -> object:
    """An array or a scalar of numpy, torch and their like; `array.array` has no shape."""
    shape = getattr(value, "shape", None)
    if (len(value) if shape is None else math.prod(shape)) > _MOST_NUMBERS:
        raise ValueError("too many numbers for a line")
    return value.tolist()


def _mapping(value: Mapping[Any, Any]) -> object:
    return {key: value[key] for key in itertools.islice(value, _MOST_NODES)}


def _bytes(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


def _exception(error: BaseException) -> object:
    return {"$type": _name(type(error)), "message": str.__str__(str(error))[:_LONGEST_MESSAGE]}


#: The first row whose class matches wins. Subclasses are read by their base's own methods.
_BY_CLASS: tuple[tuple[type, _Read], ...] = (
    (enum.Enum, lambda value: value._value_),
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (dict, lambda value: dict(dict.items(value))),
    (list, list.copy),
    (tuple, lambda value: list(tuple.__iter__(value))),
    (set, lambda value: list(set.__iter__(value))),
    (frozenset, lambda value: list(frozenset.__iter__(value))),
    (deque, lambda value: list(deque.__iter__(value))),
    (KeysView, list),
    (ValuesView, list),
    (ItemsView, list),
    (bytes, _bytes),
    (bytearray, _bytes),
    (memoryview, lambda value: _bytes(value.tobytes())),
    (datetime.datetime, datetime.datetime.isoformat),
    (datetime.date, datetime.date.isoformat),
    (datetime.time, datetime.time.isoformat),
    (datetime.timedelta, datetime.timedelta.total_seconds),
    (uuid.UUID, str),
    (decimal.Decimal, str),
    (pathlib.PurePath, str),
    (BaseException, _exception),
)

_BY_NAME: dict[str, _Read] = {
    "langchain_core.messages.base.BaseMessage": _message,
    "langgraph.types.Send": _fields_reader(["node", "arg"]),
    "pydantic.root_model.RootModel": lambda value: value.root,
}
