"""How a verb shows its progress: bars on a terminal; elsewhere a line every few seconds, from the first second on."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from jobs.terminal.output import printable, stderr
from pipeline.progress import OnProgress
from pipeline.progress import Progress as Moment

FIRST_LINE_SECONDS = 0.6  # a process is 0.3 s old when its verb begins
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_STAGES = 1.0  # so that many short stages do not fill a log


@contextlib.contextmanager
def progress(stage: str) -> Iterator[OnProgress]:
    """A listener that shows the progress of the work; `stage` is shown until the work reports its own.

    Work that takes less than FIRST_LINE_SECONDS leaves no output.
    """
    if sys.stderr.isatty() and not stderr.is_dumb_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}")
        with Bars(*columns, TimeElapsedColumn(), console=stderr, transient=True) as bars:
            tell = _Bars(bars).tell
            tell(Moment(stage, 0, None))
            yield tell
        return
    with _Lines(stage) as lines:
        yield lines.tell


class _Pace:
    """The speed of a stage. Work done before the stage began does not count.

    Some work advances in large steps, such as a shard of a million rows. Within the usual time of a step, the speed is
    that of the steps so far, and the time left runs down; beyond it, the speed falls until the step is done.
    """

    def __init__(self, moment: Moment) -> None:
        self.began = self._advanced = time.monotonic()
        self._first = self._latest = moment
        self._steps = 0

    def note(self, moment: Moment) -> None:
        """Note when the stage advances."""
        if (moment.done, moment.archives_done) != (self._latest.done, self._latest.archives_done):
            self._advanced = time.monotonic()
            self._steps += 1
        self._latest = moment

    def stands_still(self, moment: Moment) -> bool:
        """Whether the stage has made no progress yet."""
        return moment.done == self._first.done and not moment.is_complete

    def said(self, moment: Moment) -> str:
        """The state of a stage: done, total, speed, and the remaining time if the total is known."""
        seconds, waited = self._seconds()
        rate = (moment.done - self._first.done) / seconds if seconds else 0.0
        parts = []
        if moment.total is not None:
            parts.append(f"{moment.done:,} of {moment.total:,}")
        elif moment.done or moment.archives:
            parts.append(f"{moment.done:,} so far")
        if moment.archives and moment.total is None:
            parts.append(f"{moment.archives_done:,} of {moment.archives:,} archives")
        parts += [f"{rate:,.0f}/s"] if rate >= 0.5 else []
        parts += [f"{moment.rejected:,} rejected"] if moment.rejected else []
        left = self._seconds_left(moment, seconds, waited)
        parts += [f"{left:,.0f} s left"] if left is not None and left >= 1 else []
        return ", ".join(parts)

    def _seconds(self) -> tuple[float, float]:
        """The seconds that the work so far took, and those since then that the next step is expected to take anyway."""
        now = time.monotonic()
        worked, waited = self._advanced - self.began, now - self._advanced
        return (worked, waited) if waited * self._steps <= worked else (now - self.began, 0.0)

    def _seconds_left(self, moment: Moment, seconds: float, waited: float) -> float | None:
        if moment.total is not None:
            done, left = moment.done - self._first.done, moment.total - moment.done
        else:
            done, left = moment.archives_done - self._first.archives_done, moment.archives - moment.archives_done
        return seconds * left / done - waited if done > 0 else None


class _Bars:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._stage: str | None = None
        self._task: TaskID | None = None

    def tell(self, moment: Moment) -> None:
        if moment.stage != self._stage or self._task is None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._stage, self._pace = moment.stage, _Pace(moment)
            self._task = self._bars.add_task(moment.stage, total=None, said="")
        self._pace.note(moment)
        done, total = moment.done, moment.total
        if total is None and moment.archives:
            done, total = moment.archives_done, moment.archives
        self._bars.update(self._task, completed=done, total=total, said=self._pace.said(moment))


class _Lines:
    """Prints the latest moment: soon after the start, when a stage begins or ends, and at least every few seconds.

    A thread of its own prints, because an import or a long step reports nothing meanwhile.
    """

    def __init__(self, stage: str) -> None:
        self._moment = Moment(stage, 0, None)
        self._pace = _Pace(self._moment)
        self._due = self._pace.began + FIRST_LINE_SECONDS
        self._last: float | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "_Lines":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def tell(self, moment: Moment) -> None:
        with self._changed:
            now = time.monotonic()
            new = moment.stage != self._moment.stage
            ended = moment.is_complete and not (new or self._moment.is_complete)
            if new:
                self._pace = _Pace(moment)
                if self._last is not None:
                    self._due = min(self._due, max(now, self._last + SECONDS_BETWEEN_STAGES))
            self._moment = moment
            self._pace.note(moment)
            if ended or now >= self._due:
                self._print(now)
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._ended:
                now = time.monotonic()
                if now >= self._due:
                    self._print(now)
                self._changed.wait(self._due - now)

    def _print(self, now: float) -> None:
        self._last, self._due = now, now + SECONDS_BETWEEN_LINES
        said = self._pace.said(self._moment)
        seconds = now - self._pace.began
        if seconds >= SECONDS_BETWEEN_LINES and self._pace.stands_still(self._moment):
            said += f"{', ' if said else ''}for {seconds:,.0f} s"
        line = f"{self._moment.stage}: {said}" if said else f"{self._moment.stage} …"
        stderr.print(printable(line, sys.stderr.encoding), markup=False)
