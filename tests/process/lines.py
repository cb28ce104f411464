"""What must be true of every log, and what a client makes of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

__all__ = ["completed", "customs", "kept", "recoveries", "supersteps", "texts", "violations"]

Line = dict[str, Any]

ENDS = ("node.completed", "node.failed", "node.interrupted", "node.cancelled")
TERMINAL = ("run.completed", "run.failed", "run.cancelled", "run.timed_out", "run.interrupted")


def violations(lines: Sequence[Line]) -> list[str]:
    """Every way in which a whole log breaks the contract: seq, epochs, ends, attempts."""
    broken: list[str] = []
    if [line["seq"] for line in lines] != list(range(1, len(lines) + 1)):
        broken.append(f"seq: {[line['seq'] for line in lines]}")
    ends = [line["seq"] for line in lines if line["type"] in TERMINAL]
    if ends != [len(lines)]:
        broken.append(f"terminal lines at {ends} of {len(lines)}")
    tasks: dict[str, Line] = {}
    owed: set[str] = set()
    epoch = 0
    for line in lines:
        seq, type = line["seq"], line["type"]
        say = f"{seq} {type} {line.get('node', '')}"
        if type == "run.queued":
            if seq != 1 or line["epoch"] != 0:
                broken.append(f"{say}: not first")
            continue
        if type in ("run.started", "run.recovered"):
            epoch += 1
            if (type == "run.started") is not (epoch == 1):
                broken.append(f"{say}: opens epoch {epoch}")
        if line["epoch"] != epoch:
            broken.append(f"{say}: epoch {line['epoch']} in {epoch}")
        if type == "run.recovered":
            for lost in line["data"]["lost"]:
                if tasks.pop(lost["task"], None) is None:
                    broken.append(f"{say}: unknown {lost['node']} is lost")
            owed = {task for task, last in tasks.items() if last["type"] not in ENDS}
        elif type == "node.started":
            last = tasks.get(line["task"])
            if line["attempt"] == 1 and last is not None:
                broken.append(f"{say}: started again after {last['seq']} {last['type']}")
            if line["attempt"] > 1 and (last is None or last["type"] != "node.retrying"):
                broken.append(f"{say}: attempt {line['attempt']} after {last}")
            if owed:
                broken.append(f"{say}: before the end of {[tasks[t]['node'] for t in owed]}")
            tasks[line["task"]] = line
        elif type == "node.retrying":
            tasks[line["task"]] = line
        elif type in ENDS:
            last = tasks.get(line["task"])
            if last is not None and last["type"] in ENDS:
                broken.append(f"{say}: ended before, at {last['seq']}")
            if last is None:
                broken.append(f"{say}: was never started")
            if line["task"] in owed and not line["data"].get("recovered"):
                broken.append(f"{say}: ended in an epoch that did not start it")
            owed.discard(line["task"])
            tasks[line["task"]] = line
        elif type in ("token", "message", "custom") and (
            line["task"] not in tasks or (type != "message" and tasks[line["task"]]["type"] in ENDS)
        ):
            broken.append(f"{say}: of a task that does not run")
    if ends and lines[-1]["type"] in ("run.completed", "run.interrupted"):
        broken += [
            f"{last['seq']} {last['node']} is never ended"
            for last in tasks.values()
            if last["type"] not in ENDS
        ]
    return broken


def kept(lines: Sequence[Line]) -> list[Line]:
    """Without what was superseded: the rule of STREAM.md, "Discarding"."""
    result: list[Line] = []
    for line in lines:
        data = line["data"]
        if line["type"] == "node.retrying":
            result = [
                old
                for old in result
                if not (
                    old["type"] in ("token", "message", "custom")
                    and old["seq"] >= data["discard_from"]
                    and line["task"] in (old["task"], *old["path"])
                )
            ]
        elif line["type"] == "run.recovered":
            lost = {task["task"] for task in data["lost"]}
            result = [
                old
                for old in result
                if not (
                    old["type"] in ("token", "message", "custom")
                    and old["seq"] >= data["discard_from"]
                    and old["task"] in lost
                )
            ]
        elif line["type"] == "call.retrying":
            result = [
                old for old in result if old["data"].get("message_id") not in data["message_ids"]
            ]
        result.append(line)
    return result


def texts(lines: Sequence[Line]) -> list[str]:
    """The final texts, sorted: parallel nodes speak in any order."""
    folded: dict[str, str] = {}
    for line in kept(lines):
        if line["type"] == "token":
            message = line["data"]["message_id"]
            folded[message] = folded.get(message, "") + line["data"]["text"]
        elif line["type"] == "message":
            folded[line["data"]["message_id"]] = line["data"]["text"]
    return sorted(folded.values())


def customs(lines: Sequence[Line]) -> list[str]:
    """The custom values that count, sorted."""
    return sorted(repr(line["data"]["value"]) for line in kept(lines) if line["type"] == "custom")


def completed(lines: Sequence[Line]) -> Counter[str]:
    """Nodes by how often they were completed and the completion was not superseded."""
    alive: dict[int, Line] = {}
    for line in lines:
        if line["type"] == "run.recovered":
            lost = {task["task"] for task in line["data"]["lost"]}
            alive = {seq: old for seq, old in alive.items() if old["task"] not in lost}
        elif line["type"] == "node.completed":
            alive[line["seq"]] = line
    return Counter("/".join([*line["ns"], line["node"]]) for line in alive.values())


def supersteps(lines: Sequence[Line]) -> list[int]:
    """The steps of the `values` lines that were not superseded by a superstep's repetition."""
    steps: list[int] = []
    begun: dict[str, int] = {}
    for line in lines:
        if line["type"] == "node.started" and not line["path"]:
            begun[line["task"]] = line["step"]
        elif line["type"] == "run.recovered":
            lost = [begun.get(task["task"], 1_000_000) for task in line["data"]["lost"]]
            steps = [step for step in steps if step < min(lost, default=1_000_000)]
        elif line["type"] == "values":
            steps.append(line["step"])
    return steps


def recoveries(lines: Sequence[Line]) -> list[Line]:
    """The data of the `run.recovered` lines."""
    return [line["data"] for line in lines if line["type"] == "run.recovered"]
