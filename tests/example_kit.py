"""Loads an example as its server does: its modules are its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

__all__ = ["EXAMPLES", "load"]

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The `graph.py` of an example; its modules are forgotten at the end."""
    folder = EXAMPLES / name
    siblings = {path.stem for path in folder.glob("*.py")}
    assert not siblings & sys.modules.keys()
    monkeypatch.syspath_prepend(folder)
    spec = spec_from_file_location(f"example_{name}", folder / "graph.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    for sibling in siblings:
        sys.modules.pop(sibling, None)
