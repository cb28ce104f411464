"""Notices when the event loop is late, and says which node, at which line, keeps it from turning.

A heartbeat on the loop measures how late it is called. A thread looks for the heartbeat: where it
does not appear, the thread reads what the loop's own thread executes, again and again until the
loop turns. So a stall is told with the place where most of these `samples` found the loop, and with
how many they are (`samples_here`): all, for one call that blocks; few, for many short steps.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

import structlog

from telemetry.langgraph import current_attempt
from telemetry.metrics import Metrics
from telemetry.segments import current_segment

__all__ = ["LoopWatch"]

#: A stall that goes on is told after this time, and after each doubling.
_TOLD_AFTER_S = 5.0
#: Frames of a stack that are told, the innermost.
_FRAMES = 30
#: Places that one stall tells apart.
_PLACES = 50
#: `event_loop_lag_max_seconds` looks back over so many spans of so many seconds.
_SPANS, _SPAN_S = 12, 5.0

_log = structlog.get_logger("telemetry")


class LoopWatch:
    """Watches the loop that it is entered on until it is left. With `stall_s` 0, lag only."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        stall_s: float = 0.25,
        period_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._stall_s = stall_s
        self._period_s = period_s
        self._clock = clock
        self._lag = metrics["event_loop_lag_seconds"]
        self._pulse = _Pulse()
        self._peaks = _Peaks()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        self._loop = loop = asyncio.get_running_loop()
        self._pulse.beat = self._clock()
        self._timer = loop.call_later(self._period_s, self._turn)
        # Read by whoever scrapes, in a thread: true while the loop is blocked.
        self._metrics["event_loop_lag_max_seconds"].watch(self.lag_max)
        self._metrics["event_loop_heartbeat_age_seconds"].watch(self.age)
        self._metrics["event_loop_tasks"].watch(lambda: len(asyncio.all_tasks(loop)))
        if self._stall_s > 0:
            ident = threading.get_ident()
            watchdog = _Watchdog(
                self._pulse,
                self._metrics,
                lambda: whereabouts(loop, ident),
                stall_s=self._stall_s,
                period_s=self._period_s,
            )
            self._thread = threading.Thread(
                target=watchdog.run,
                args=(self._leaving, self._clock),
                name="sereno-loopwatch",
                daemon=True,
            )
            self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(0.5)
        self._pulse.beat = math.nan

    def age(self) -> float:
        """Seconds since the loop last turned; NaN when nobody watches. For any thread."""
        return self._clock() - self._pulse.beat

    def lag_max(self) -> float:
        """The longest lag of the last minute, that of a loop which is blocked now included."""
        now = self._clock()
        return max(self._peaks.highest(now), now - self._pulse.beat - self._period_s)

    def _turn(self) -> None:
        """The heartbeat."""
        now, before = self._clock(), self._pulse.beat
        lag = max(0.0, now - before - self._period_s)
        if lag > self._stall_s:
            self._pulse.gap = (before, now)
        self._pulse.beat = now
        self._lag.observe(lag)
        self._peaks.add(now, lag)
        if self._loop is not None:
            self._timer = self._loop.call_later(self._period_s, self._turn)


class _Pulse:
    """What the loop writes, and threads read."""

    __slots__ = ("beat", "gap")

    def __init__(self) -> None:
        #: When the loop last turned.
        self.beat = math.nan
        #: The last two beats with a stall between them.
        self.gap = (math.nan, math.nan)


class _Peaks:
    """The highest of the last minute's values. Written by one thread, read by any."""

    def __init__(self) -> None:
        self._spans = [(-1, 0.0)] * (_SPANS + 1)

    def add(self, now: float, value: float) -> None:
        number = int(now / _SPAN_S)
        index = number % len(self._spans)
        known, peak = self._spans[index]
        if known != number or value > peak:
            self._spans[index] = (number, value)

    def highest(self, now: float) -> float:
        oldest = int(now / _SPAN_S) - _SPANS
        return max((peak for number, peak in self._spans if number >= oldest), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a loop's thread executes at one moment. Empty where there is no run, no node."""

    run_id: str = ""
    thread_id: str = ""
    graph: str = ""
    node: str = ""
    attempt: int | None = None
    #: `trace_id` and `span_id` of the run.
    ids: tuple[str, str] | None = None
    #: The innermost line that is no library's, else the innermost.
    file: str = ""
    line: int = 0
    function: str = ""
    #: `file:line in function`, the innermost last.
    stack: str = field(default="", compare=False)


class _Stall:
    """One time that the loop did not turn."""

    def __init__(self, beat: float) -> None:
        #: The last turn before it.
        self.beat = beat
        self.blocked_s = 0.0
        #: What of it the process did not run at all.
        self.lost_s = 0.0
        self.samples = 0
        self.places: dict[tuple[str, str, str, str], tuple[int, Place]] = {}
        self.told = 0
        self.tell_at = _TOLD_AFTER_S

    def add(self, place: Place) -> None:
        """Count a sample; lines of one function are one place."""
        self.samples += 1
        key = (place.run_id, place.node, place.file, place.function)
        count, first = self.places.get(key, (0, place))
        if count or len(self.places) < _PLACES:
            self.places[key] = (count + 1, first)

    def place(self) -> tuple[int, Place]:
        """Where most samples were, and how many."""
        return max(self.places.values(), key=lambda counted: counted[0], default=(0, Place()))


class _Watchdog:
    """Tells a loop that is blocked from a process that did not run."""

    def __init__(
        self,
        pulse: _Pulse,
        metrics: Metrics,
        whereabouts: Callable[[], Place],
        *,
        stall_s: float,
        period_s: float,
    ) -> None:
        self._pulse = pulse
        self._stalls = metrics["event_loop_stalls_total"]
        self._errors = metrics["telemetry_internal_errors_total"]
        self._whereabouts = whereabouts
        self._stall_s = stall_s
        self._period_s = period_s
        self._stall: _Stall | None = None
        self._beat = math.nan
        self._lost_s = 0.0
        #: The last look, how long the pause after it was to be, and the processor time at it.
        self._looked, self._pause, self._cpu_s = math.nan, 0.0, 0.0

    def run(self, leaving: threading.Event, clock: Callable[[], float]) -> None:
        """The watching thread."""
        pause = 0.0
        while not leaving.wait(pause):
            try:
                pause = self.look(clock(), time.process_time())
            except Exception:
                self._errors.inc("loopwatch")
                pause = 1.0
        if self._stall is not None:
            self._tell(self._stall, ongoing=False)

    def look(self, now: float, cpu_s: float) -> float:
        """See how the loop is; returns how long to wait until the next look."""
        beat, stall = self._pulse.beat, self._stall
        lost_s = self._lost(now, cpu_s)
        if stall is not None and beat != stall.beat:
            self._over(stall, now, lost_s)
            stall = self._stall = None
        if beat == self._beat:
            self._lost_s += lost_s
        else:  # what was lost before it does not count
            self._beat, self._lost_s = beat, min(lost_s, now - beat)
        late = now - beat - self._period_s - self._lost_s
        if stall is None and late >= self._stall_s:
            stall = self._stall = _Stall(beat)
        if stall is not None:
            stall.blocked_s, stall.lost_s = late, self._lost_s
            place = self._whereabouts()
            if self._pulse.beat == beat:  # else it is where the loop went afterwards
                stall.add(place)
            if late >= stall.tell_at:
                self._tell(stall, ongoing=True)
        self._pause = self._period_s
        if stall is None:
            self._pause = max(self._period_s, self._stall_s - late)
        return self._pause

    def _lost(self, now: float, cpu_s: float) -> float:
        """Seconds in which nothing of this process ran: suspended, throttled, or starved.

        This thread was called late, and the process has used no processor meanwhile. Where it has,
        somebody did not let go of the interpreter, and the loop was blocked indeed.
        """
        since, used = now - self._looked, cpu_s - self._cpu_s
        self._looked, self._cpu_s = now, cpu_s
        overslept = since - self._pause
        return since if overslept > self._stall_s / 4 and used < overslept / 2 else 0.0

    def _over(self, stall: _Stall, now: float, lost_s: float) -> None:
        before, after = self._pulse.gap
        ended = after if before == stall.beat else now
        lasted = ended - stall.beat - self._period_s - stall.lost_s - lost_s
        stall.blocked_s = max(stall.blocked_s, lasted)
        self._tell(stall, ongoing=False)

    def _tell(self, stall: _Stall, *, ongoing: bool) -> None:
        here, place = stall.place()
        if not stall.told:
            self._stalls.inc(place.graph, place.node)
        stall.told += 1
        stall.tell_at = stall.blocked_s * 2
        ids = {"trace_id": place.ids[0], "span_id": place.ids[1]} if place.ids else {}
        run = {"run_id": place.run_id, "thread_id": place.thread_id} if place.run_id else {}
        attempt = {"attempt": place.attempt} if place.attempt is not None else {}
        _log.warning(
            "Event loop is blocked" if ongoing else "Event loop was blocked",
            event_type="loop.stalled",
            **ids,
            **run,
            graph=place.graph,
            node=place.node,
            **attempt,
            file=place.file,
            line=place.line,
            function=place.function,
            blocked_s=round(stall.blocked_s, 3),
            ongoing=ongoing,
            samples=stall.samples,
            samples_here=here,
            stack=place.stack,
        )


def whereabouts(loop: asyncio.AbstractEventLoop, ident: int) -> Place:
    """What the thread `ident` of a loop executes; for another thread. Never raises."""
    try:
        return _whereabouts(loop, ident)
    except Exception:  # what we read changes under our hands
        return Place()


_Frame = tuple[FrameType, int]


def _whereabouts(loop: asyncio.AbstractEventLoop, ident: int) -> Place:
    task = asyncio.current_task(loop)
    frames = list(_frames(sys._current_frames().get(ident), task))
    context = _context(task)
    attempt = context.get(current_attempt)
    segment = context.get(current_segment)
    innermost = next((frame for frame in frames if not _library(frame[0])), None)
    if innermost is None or task is None:  # frames of no task are those of whoever runs the loop
        innermost = frames[0]
    code = innermost[0].f_code
    stack = [
        f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}"
        for frame, line in reversed(frames[:_FRAMES])
    ]
    return Place(
        run_id=segment.run_id if segment is not None else "",
        thread_id=segment.thread_id if segment is not None else "",
        graph=segment.graph if segment is not None else "",
        node=attempt.visit.label if attempt is not None else "",
        attempt=attempt.number if attempt is not None else None,
        ids=segment.ids if segment is not None else None,
        file=code.co_filename,
        line=innermost[1],
        function=code.co_qualname,
        stack="\n".join(stack),
    )


def _frames(frame: FrameType | None, task: asyncio.Task[Any] | None) -> Iterator[_Frame]:
    """The frames of a task, the innermost first; all frames of a thread that runs no task."""
    outermost = getattr(task.get_coro(), "cr_frame", None) if task is not None else None
    while frame is not None:
        yield frame, frame.f_lineno or 0
        if frame is outermost:
            return
        frame = frame.f_back


def _context(task: asyncio.Task[Any] | None) -> contextvars.Context:
    """The context that a task runs in: a node's body runs in tasks that LangGraph, or the body
    itself, has made; what they inherit tells the node."""
    if task is None:
        return contextvars.Context()
    if sys.version_info >= (3, 12):
        return task.get_context()
    # The first context that a task refers to is its own; others are those of its callbacks.
    found = (x for x in gc.get_referents(task) if isinstance(x, contextvars.Context))
    return next(found, contextvars.Context())


_LIBRARIES = tuple(
    {path for name, path in sysconfig.get_paths().items() if name.endswith(("stdlib", "lib"))}
)


def _library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(("<", *_LIBRARIES))
