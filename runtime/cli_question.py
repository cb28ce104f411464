"""What a run asks somebody, what answers fit, and how one is given on a command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime.cli_screen import clean, compact

__all__ = ["asked", "fitting", "given", "told"]

#: What stands for an answer that nobody can guess.
OPEN = "…"
#: Levels of a schema that are shown, and most characters.
DEEPEST, LONGEST = 4, 300


def asked(interrupt: Mapping[str, Any]) -> Iterator[str]:
    """An interrupt, as a person reads it."""
    yield from told(interrupt.get("value"))
    if isinstance(schema := interrupt.get("response_schema"), Mapping):
        yield f"fits: {fitting(schema)}"


def told(value: Any) -> Iterator[str]:
    """The value of an interrupt: texts as text, the rest as JSON."""
    if isinstance(value, str):
        yield clean(value)
    elif isinstance(value, Mapping) and value:
        for name, member in value.items():
            if name == "answers" and isinstance(member, list):
                text = " | ".join(_worded(answer) for answer in member)
            else:
                text = clean(member) if isinstance(member, str) else compact(member, 2000)
            yield f"{clean(name)}: {text}"
    else:
        yield compact(value, 2000)


def given(interrupt: Mapping[str, Any]) -> Any:
    """An answer to begin with: the first in JSON that the question names."""
    value = interrupt.get("value")
    answers = value.get("answers") if isinstance(value, Mapping) else None
    for answer in answers if isinstance(answers, list) else ():
        if not isinstance(answer, str):
            return answer
        try:
            parsed = json.loads(answer)
        except ValueError:
            continue
        if not isinstance(parsed, str):
            return parsed
    return OPEN


def fitting(schema: Mapping[str, Any]) -> str:
    """A JSON Schema on one line, such as `{"approve": boolean, "remark"?: string | null}`."""
    defined = schema.get("$defs")
    text = clean(_fitting(schema, defined if isinstance(defined, Mapping) else {}, DEEPEST))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _fitting(schema: Any, defined: Mapping[str, Any], levels: int) -> str:
    if not isinstance(schema, Mapping):
        return "anything"
    if levels == 0:
        return OPEN
    if isinstance(reference := schema.get("$ref"), str):
        return _fitting(defined.get(reference.rpartition("/")[2]), defined, levels - 1)
    if "const" in schema:
        return compact(schema["const"])
    if isinstance(values := schema.get("enum"), list):
        return " | ".join(map(compact, values))
    for several in ("anyOf", "oneOf"):
        if isinstance(schemas := schema.get(several), list):
            return _either(_fitting(one, defined, levels) for one in schemas)
    types = schema.get("type")
    if isinstance(types, list):
        return _either(_fitting({**schema, "type": one}, defined, levels) for one in types)
    if isinstance(members := schema.get("properties"), Mapping):
        required = schema.get("required") or ()
        return f"{{{', '.join(_members(members, required, defined, levels))}}}"
    if types == "object":
        return "{…}"
    if types == "array":
        return f"[{_fitting(schema.get('items'), defined, levels - 1)}, …]"
    return types if isinstance(types, str) else "anything"


def _members(
    members: Mapping[str, Any], required: Sequence[str], defined: Mapping[str, Any], levels: int
) -> Iterator[str]:
    for name, schema in members.items():
        optional = "" if name in required else "?"
        yield f"{compact(name)}{optional}: {_fitting(schema, defined, levels - 1)}"


def _either(texts: Iterator[str]) -> str:
    return " | ".join(dict.fromkeys(texts))


def _worded(answer: Any) -> str:
    return clean(answer) if isinstance(answer, str) else compact(answer)
