"""The dashboards, rules and configurations that come with Sereno, and a way to get them out."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

__all__ = ["Edited", "write"]

#: An installation has them inside of the package, a checkout beside it.
_INSTALLED = Path(__file__).parent / "_monitoring"
_ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parent.parent

#: Folders and files, and what they are called where they are written.
_PARTS = {
    "dashboards/alertmanager": "alertmanager",
    "dashboards/grafana": "grafana",
    "dashboards/prometheus": "prometheus",
    "dashboards/provisioning": "provisioning",
    "otel-collector.yaml": "otel-collector.yaml",
    "otel-collector.sampling.yaml": "otel-collector.sampling.yaml",
}


class Edited(Exception):
    """Files that would be lost differ from ours."""


def write(folder: Path, *, force: bool = False) -> list[Path]:
    """Write all of them below a folder; nothing when that would lose somebody's edits."""
    files = {folder / place: source for source, place in _files()}
    edited = [
        str(target)
        for target, source in files.items()
        if target.exists() and not filecmp.cmp(source, target, shallow=False)
    ]
    if edited and not force:
        raise Edited(", ".join(sorted(edited)))
    for target, source in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return sorted(files)


def _files() -> list[tuple[Path, Path]]:
    """Every file, and its place."""
    found = []
    for name, place in _PARTS.items():
        part = _ROOT / name
        if part.is_file():
            found.append((part, Path(place)))
        else:
            inside = (path for path in part.rglob("*") if path.is_file())
            found += [(path, place / path.relative_to(part)) for path in inside]
    return found
