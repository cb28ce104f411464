"""How each project of user code gets its own modules, as if it were alone in the process."""

from __future__ import annotations

import builtins
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Project", "digest"]

#: Top-level names that belong to Sereno, whatever a project calls its own packages.
OURS = frozenset({"runtime", "telemetry"})


class Project(MetaPathFinder):
    """A folder of user code whose modules import each other as if they were alone in the process.

    What a name means to a module of the project, in this order:

    - the standard library's and installed packages' names mean these, as for LangGraph's CLI,
      which puts a project at the end of the path;
    - a name of ours (`runtime`) that the project has too is loaded under a private name;
    - so is one that an earlier project has (`agent`);
    - any other name found on its paths is loaded as it is called.

    Each of its modules is run with an `__import__` that knows this, and keeps it for imports
    inside functions. `importlib.import_module` does not pass there: it finds every name but the
    private ones. Nothing is put on `sys.path`.
    """

    def __init__(self, key: str, folder: Path, paths: tuple[str, ...]) -> None:
        self.folder = folder
        self._paths = paths
        self._key = key
        self._prefix = f"sereno_project_{digest(key)}_"
        self._meanings: dict[str, str | None] = {}
        self._files: dict[Path, ModuleType] = {}
        self._names: set[str] = set()
        self.builtins = {**vars(builtins), "__import__": self._import}

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Lets the project's modules be found; at the end they are forgotten."""
        sys.meta_path.insert(len(_projects()), self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            for name in self._names:
                sys.modules.pop(name, None)

    def load_module(self, name: str) -> ModuleType:
        return importlib.import_module(self._renamed(name))

    def load_file(self, path: Path) -> ModuleType:
        """Runs a file once, under a private name that does not change when the project moves."""
        if path not in self._files:
            relative = Path(os.path.relpath(path, self.folder)).as_posix()
            name = f"sereno_graph_{digest(f'{self._key}/{relative}')}"
            loader = _Loader(self, name, str(path))
            spec = spec_from_file_location(name, path, loader=loader)
            assert spec is not None
            module = module_from_spec(spec)
            # How telemetry names the functions in it.
            module.__dict__["sereno_module"] = path.stem
            # Before it runs: dataclasses and type hints look their module up.
            sys.modules[name] = module
            self._names.add(name)
            try:
                loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
            self._files[path] = module
        return self._files[path]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = fullname.partition(".")[0]
        public = top.removeprefix(self._prefix)
        if self._meaning(public) != top:
            return None
        found = self._own(public) if fullname == top else PathFinder.find_spec(fullname, path)
        if found is None:
            return None
        self._names.add(fullname)
        return self._adopted(fullname, found)

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level == 0:
            name = self._renamed(name)
        return builtins.__import__(name, globals, locals, fromlist, level)

    def _renamed(self, name: str) -> str:
        top, dot, rest = name.partition(".")
        return (self._meaning(top) or top) + dot + rest

    def _meaning(self, top: str) -> str | None:
        """What the project's `top` is called in sys.modules; None if the project has none."""
        if top not in self._meanings:
            self._meanings[top] = self._decide(top)
        return self._meanings[top]

    def _decide(self, top: str) -> str | None:
        own = self._own(top)
        if own is None:
            return None
        installed = _installed(top)
        if top in OURS:
            # A project may be the folder that Sereno itself is in.
            return None if installed and _place(installed) == _place(own) else self._prefix + top
        projects = _projects()
        # The working directory can be on sys.path: what is found there is not installed.
        places = [_place(spec) for project in projects if (spec := project._own(top))]
        if installed and _place(installed) not in places:
            return None
        earlier = projects[: projects.index(self)]
        return self._prefix + top if any(other._own(top) for other in earlier) else top

    def _own(self, top: str) -> ModuleSpec | None:
        return PathFinder.find_spec(top, self._paths)

    def _adopted(self, name: str, found: ModuleSpec) -> ModuleSpec | None:
        """`found` under the name that it is imported by, to be run with the project's imports."""
        folders = found.submodule_search_locations
        if found.origin is None or found.loader is None:
            namespace = ModuleSpec(name, None, is_package=True)
            namespace.submodule_search_locations = list(folders or ())
            return namespace
        kind: Any = type(found.loader)
        loader = (
            _Loader(self, name, found.origin)
            if kind is SourceFileLoader
            else kind(name, found.origin)
        )
        return spec_from_file_location(
            name, found.origin, loader=loader, submodule_search_locations=folders
        )


class _Loader(SourceFileLoader):
    """Runs a file with its project's `__import__`."""

    def __init__(self, project: Project, name: str, path: str) -> None:
        super().__init__(name, path)
        self._project = project

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self._project.builtins
        super().exec_module(module)


def _projects() -> list[Project]:
    return [finder for finder in sys.meta_path if isinstance(finder, Project)]


def _installed(top: str) -> ModuleSpec | None:
    """What the rest of the process would import as `top`."""
    for finder in sys.meta_path:
        if not isinstance(finder, Project) and (spec := finder.find_spec(top, None)):
            return spec
    return None


def _place(spec: ModuleSpec) -> object:
    if spec.origin:
        return os.path.realpath(spec.origin)
    return [os.path.realpath(folder) for folder in spec.submodule_search_locations or ()]


def digest(text: str) -> str:
    """A short name for a text, equal in every process."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
