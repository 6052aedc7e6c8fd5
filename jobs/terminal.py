"""What the verbs write: results on stdout, progress and notes on stderr."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from pipeline.progress import OnProgress
from pipeline.progress import Progress as Moment

SECONDS_BETWEEN_LINES = 5.0
WIDTH_WITHOUT_TERMINAL = 120

stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def say(text: str) -> None:
    """A line of a result on stdout."""
    stdout.print(text, markup=False)


def counted(number: int, thing: str) -> str:
    """A number with its noun: "1 file", "2,000 files", "1 entry", "2 entries"."""
    many = f"{thing[:-1]}ies" if thing.endswith("ry") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else many}"


def note(text: str) -> None:
    """A remark on stderr."""
    stderr.print(f"note: {text}", markup=False)


@contextlib.contextmanager
def progress() -> Iterator[OnProgress]:
    """A listener that draws bars on a terminal, and elsewhere prints a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines().tell
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=stderr, transient=True) as bars:
        yield _Bars(bars).tell


class _Clock:
    """Rate of a stage since its first moment; rows that were done before count as no work."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._began = 0.0
        self._first = 0

    def rate(self, moment: Moment) -> tuple[bool, float]:
        """Whether the stage is new, and rows a second."""
        now = time.monotonic()
        new = moment.stage != self._stage
        if new:
            self._stage, self._began, self._first = moment.stage, now, moment.done
        return new, (moment.done - self._first) / (now - self._began) if now > self._began else 0.0


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._clock = _Clock()
        self._task: TaskID | None = None

    def tell(self, moment: Moment) -> None:
        new, rate = self._clock.rate(moment)
        rejected = f", {moment.rejected:,} rejected" if moment.rejected else ""
        if new or self._task is None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(moment.stage, total=moment.total, rate="")
        speed = f"{rate:,.0f}/s" if rate else ""
        self._bars.update(self._task, completed=moment.done, total=moment.total, rate=f"{speed}{rejected}")


class _Lines:
    def __init__(self) -> None:
        self._clock = _Clock()
        self._last = 0.0

    def tell(self, moment: Moment) -> None:
        new, rate = self._clock.rate(moment)
        now = time.monotonic()
        if new:
            self._last = now
            return
        total = moment.total if moment.total is not None else "?"
        is_going_on = moment.total is None or moment.done < moment.total
        if is_going_on and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = f", {(moment.total - moment.done) / rate:,.0f} s left" if rate and moment.total and is_going_on else ""
        rejected = f", {moment.rejected:,} rejected" if moment.rejected else ""
        line = f"{moment.stage}: {moment.done:,} of {total}, {rate:,.0f}/s{rejected}{left}"
        stderr.print(line, markup=False)
