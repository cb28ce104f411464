"""URL scheme → engine: the one table where a new engine is listed."""

from __future__ import annotations

from importlib import import_module

from runtime.engines.base import Engine
from runtime.errors import BadSetting

__all__ = ["ENGINES", "create"]

#: Imported lazily, so that a driver that is not used need not be installed.
ENGINES = {
    "memory": "runtime.engines.memory:MemoryEngine",
    "sqlite": "runtime.engines.sqlite.engine:SqliteEngine",
}


def create(url: str, **options: object) -> Engine:
    """The engine for `scheme://…`, not yet opened. Raises BadSetting for an unknown scheme."""
    scheme = url.partition(":")[0]
    if scheme not in ENGINES:
        raise BadSetting(
            f"SERENO_ENGINE: unknown engine {url!r}; use one of "
            + ", ".join(f"{name}://" for name in ENGINES)
        )
    module, _, name = ENGINES[scheme].partition(":")
    engine: Engine = getattr(import_module(module), name)(url, **options)
    return engine
