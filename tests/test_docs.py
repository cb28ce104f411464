"""The documents say what the code does: tables are compared with what they describe."""

from __future__ import annotations

import re
from pathlib import Path

from runtime import events
from runtime.app import create_app
from runtime.settings import Settings

ROOT = Path(__file__).parent.parent


def table_under(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its head."""
    section = text.split(f"## {heading}\n", 1)[1]
    rows = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_every_line_type_has_a_row_and_every_row_a_line_type() -> None:
    rows = table_under((ROOT / "docs/events.md").read_text("utf-8"), "Types")
    documented = {row[0].strip("`") for row in rows}

    assert documented == {*events.STORED_TYPES, *events.UNSTORED_TYPES}


def test_every_setting_has_a_row_with_its_default_and_sentence() -> None:
    rows = table_under((ROOT / "docs/settings.md").read_text("utf-8"), "Settings")
    documented = {row[0].strip("`"): (row[1].strip("`"), row[2]) for row in rows}
    declared = {
        f"SERENO_{name.upper()}": (str(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }

    assert documented == declared


def test_every_route_is_in_the_endpoint_table() -> None:
    rows = table_under((ROOT / "docs/events.md").read_text("utf-8"), "Endpoints")
    documented = " ".join(row[0] for row in rows)
    paths = create_app(Settings(), []).openapi()["paths"]

    for path in paths:
        plain = re.sub(r"\{[^}]*\}", "{}", path).removeprefix("/v1/graphs")
        assert plain in re.sub(r"\{[^}]*\}", "{}", documented), path


def test_the_readme_names_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")

    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_every_promise_of_the_readme_names_the_tests_that_hold_it() -> None:
    rows = table_under((ROOT / "README.md").read_text("utf-8"), "What is promised")

    assert rows
    for promise, tests in rows:
        held_by = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", tests)
        assert held_by, promise
        for words, path in held_by:
            name = f"def test_{words.replace(' ', '_')}("
            assert name in (ROOT / path).read_text("utf-8"), f"{promise}: {words}"


def test_the_readme_shows_python_that_compiles() -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.M | re.S
    )

    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
