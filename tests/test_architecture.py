"""Executes the layer table of docs/architecture.md: imports point down; telemetry knows nobody."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Highest row first. A box is a module or package and all below it; the longest name that fits
#: counts, so `runtime.engines.base` is not in the box of `runtime.engines`.
ROWS: list[list[str]] = [
    ["runtime.__main__"],
    [
        "runtime.cli",
        "runtime.cli_client",
        "runtime.cli_surroundings",
        "runtime.cli_view",
        "runtime.cli_trace",
        "runtime.cli_top",
        "runtime.cli_question",
        "runtime.cli_screen",
        "runtime.monitoring",
    ],
    ["runtime.app"],
    ["runtime.api", "runtime.execution", "runtime.engines.memory", "runtime.engines.sqlite"],
    ["runtime.engines"],
    [
        "runtime.transports",
        "runtime.graphs",
        "runtime.projects",
        "runtime.engines.base",
        "runtime.engines.serde",
        "runtime.resilience",
    ],
    ["runtime.settings", "runtime.events"],
    ["runtime.errors"],
    ["runtime.model"],
    ["telemetry"],
]
ROW = {box: number for number, row in enumerate(ROWS) for box in row}
#: Two names of one box: they may import each other.
SAME = {
    "runtime.cli_client": "runtime.cli",
    "runtime.cli_surroundings": "runtime.cli",
    "runtime.cli_view": "runtime.cli",
    "runtime.cli_trace": "runtime.cli",
    "runtime.cli_top": "runtime.cli",
    "runtime.cli_question": "runtime.cli",
    "runtime.cli_screen": "runtime.cli",
    "runtime.monitoring": "runtime.cli",
    "runtime.projects": "runtime.graphs",
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("runtime", "telemetry"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def box_of(module: str) -> str | None:
    """The box that a module belongs to; None for the bare package `runtime`."""
    while module:
        if module in ROW:
            return module
        module = module.rpartition(".")[0]
    return None


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            known = dict(modules())
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in known else node.module


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_a_file_imports_only_from_its_own_box_or_a_lower_row(module: str, path: Path) -> None:
    box = box_of(module)
    ours = [
        (line, name)
        for line, name in imports_of(path)
        if name.partition(".")[0] in ("runtime", "telemetry")
    ]
    if box is None:
        assert not ours, f"{module} is imported with every leaf: it imports nothing"
        return

    for line, name in ours:
        target = box_of(name)
        allowed = target is None or (
            SAME.get(target, target) == SAME.get(box, box) or ROW[target] > ROW[box]
        )
        assert allowed, f"{path}:{line}: {module} (row {ROW[box]}) imports {name}"


def test_every_box_of_the_table_exists() -> None:
    known = {module for module, _ in modules()}

    assert set(ROW) <= known


def test_engines_are_imported_by_the_table_only() -> None:
    """A driver that is not used need not be installed."""
    for module, path in modules():
        if module.startswith(("runtime.engines.sqlite", "runtime.engines.memory")):
            continue
        for line, name in imports_of(path):
            assert not name.startswith(("runtime.engines.sqlite", "runtime.engines.memory")), (
                f"{path}:{line}"
            )


def test_no_middleware_is_built_on_starlettes_base_class() -> None:
    for _, path in modules():
        assert "BaseHTTPMiddleware" not in path.read_text("utf-8"), path
