from __future__ import annotations

from collections.abc import Iterator

import pytest

from .programs import Programs, programs


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Starts real programs; they end with the module's tests."""
    with programs(tmp_path_factory.mktemp("programs")) as made:
        yield made
