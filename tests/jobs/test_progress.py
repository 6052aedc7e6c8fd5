"""Progress without a terminal: it begins at once, goes on every few seconds, and has an end that does not move."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.terminal import progress as progress_lines
from jobs.terminal.progress import FIRST_LINE_SECONDS, SECONDS_BETWEEN_LINES, _Pace, progress
from pipeline import VisualMemory
from pipeline.progress import Progress
from tests.conftest import ENCODER
from tests.edits.test_add import many_pictures
from tests.images.archives import tar_of


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> float:
    """Lines come twenty times as often; returns the seconds between them."""
    monkeypatch.setattr(progress_lines, "FIRST_LINE_SECONDS", FIRST_LINE_SECONDS / 20)
    monkeypatch.setattr(progress_lines, "SECONDS_BETWEEN_LINES", SECONDS_BETWEEN_LINES / 20)
    monkeypatch.setattr(progress_lines, "SECONDS_BETWEEN_STAGES", 0.05)
    return SECONDS_BETWEEN_LINES / 20


def test_what_is_done_at_once_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading"):
        pass
    assert lines_of(capsys) == []


class Log:
    """What has been printed on stderr so far, read as it comes."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._text = capsys, ""

    def lines(self) -> list[str]:
        printed = self._capsys.readouterr()
        assert printed.out == ""
        self._text += printed.err
        return self._text.splitlines()

    def wait_for(self, line: str, times: int = 1) -> None:
        """Wait until a line that matches has come so many times."""
        until = time.monotonic() + 60
        while sum(bool(re.fullmatch(line, each)) for each in self.lines()) < times:
            assert time.monotonic() < until, self._text
            time.sleep(0.01)


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    return Log(capsys)


def test_a_step_that_tells_nothing_is_told_of_all_the_same(log: Log, hurried: float) -> None:
    began = time.monotonic()
    with progress("loading"):
        log.wait_for(r"loading: for \d+ s", 3)
    took = time.monotonic() - began
    first, *others = log.lines()
    assert first == "loading …"
    assert 3 <= len(others) <= took / hurried
    assert all(re.fullmatch(r"loading: for \d+ s", line) for line in others)


def test_every_stage_begins_with_a_line_and_ends_with_one(log: Log, hurried: float) -> None:
    with progress("loading") as tell:
        log.wait_for("loading …")
        tell(Progress("embedding", 0, 2_000))
        log.wait_for("embedding: 0 of 2,000")
        tell(Progress("embedding", 1_000, 2_000, 7))
        log.wait_for(r"embedding: 1,000 of 2,000, [\d,]+/s, 7 rejected(, \d+ s left)?")
        tell(Progress("embedding", 2_000, 2_000, 7))
    first, *lines = log.lines()
    assert first == "loading …"
    [first_of_stage, *_] = [line for line in lines if line.startswith("embedding")]
    assert first_of_stage == "embedding: 0 of 2,000"
    assert re.fullmatch(r"embedding: 1,000 of 2,000, [\d,]+/s, 7 rejected(, \d+ s left)?", lines[-2]), lines
    assert re.fullmatch(r"embedding: 2,000 of 2,000, [\d,]+/s, 7 rejected", lines[-1]), lines


def test_many_short_stages_do_not_fill_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("starting") as tell:
        for number in range(1_000):
            tell(Progress(f"stage {number}", 0, 10))
            time.sleep(0.001)
    assert len(lines_of(capsys)) <= 4


def test_an_unknown_end_is_none(log: Log, hurried: float) -> None:
    with progress("listing") as tell:
        tell(Progress("listing", 12_000, None))
        log.wait_for("listing: 12,000 so far.*")
        tell(Progress("embedding", 0, None, 0, 0, 8))
        log.wait_for("embedding: 0 so far, 0 of 8 archives.*")
        tell(Progress("embedding", 1_241, None, 0, 3, 8))
        log.wait_for("embedding: 1,241 so far, 3 of 8 archives, .*")
    lines = log.lines()
    assert lines[0].startswith(("listing …", "listing: 12,000 so far"))
    assert "embedding: 0 so far, 0 of 8 archives" in lines
    assert lines[-1].startswith("embedding: 1,241 so far, 3 of 8 archives, ")
    assert not any(" of 1,241" in line for line in lines)


def test_what_was_done_before_counts_as_no_speed(log: Log, hurried: float) -> None:
    with progress("loading") as tell:
        tell(Progress("embedding", 1_000_000, 2_000_000))
        log.wait_for(r"embedding: 1,000,000 of 2,000,000(, for \d+ s)?")
    assert re.fullmatch(r"embedding: 1,000,000 of 2,000,000(, for \d+ s)?", log.lines()[-1])


def test_the_time_left_runs_down_between_large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_lines, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = _Pace(Progress("populating", 0, 3_000))
    moment = Progress("populating", 1_000, 3_000)
    said = {}
    for now[0] in (30.0, 50.0, 60.0, 90.0):
        pace.note(moment)
        said[now[0]] = pace.said(moment)
    assert said == {
        30.0: "1,000 of 3,000, 33/s, 60 s left",
        50.0: "1,000 of 3,000, 33/s, 40 s left",
        60.0: "1,000 of 3,000, 33/s, 30 s left",
        90.0: "1,000 of 3,000, 11/s, 180 s left",  # the second step takes longer than the first
    }


def test_lines_from_several_threads_are_whole(capsys: pytest.CaptureFixture[str], hurried: float) -> None:
    with progress("starting") as tell:

        def work(name: str) -> None:
            for done in range(101):
                tell(Progress(name, done, 100))
                time.sleep(0.001)

        threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(hurried)
    assert all(re.fullmatch(r"(starting|one|two)(:.*| …)", line) for line in lines_of(capsys))


def test_an_add_of_tars_tells_from_the_first_second_on(tmp_path: Path, weights: str) -> None:
    """A real add in a process of its own, its stderr a file, as in a job; every line with the time it came."""
    source = tmp_path / "tars"
    source.mkdir()
    for number in range(4):
        pictures = many_pictures(tmp_path / f"of{number}", 60 * (number + 1))
        members = {path.name: path.read_bytes() for path in sorted(pictures.rglob("*.png"))}
        (source / f"{number}.tar").write_bytes(tar_of(members))
    flags = ["--encoder", ENCODER, "--weights", weights, "--weights-order", "positional", "--image-size", "64"]
    command = [sys.executable, "-m", "jobs.cli", "add", str(tmp_path / "memory"), str(source), *flags]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stderr=stream, stdout=subprocess.PIPE, text=True)
        began, seen = time.monotonic(), list[tuple[float, int]]()
        while process.poll() is None:
            size = log.stat().st_size
            if not seen or size != seen[-1][1]:
                seen.append((time.monotonic() - began, size))
            time.sleep(0.02)
    text = log.read_text()
    out = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, text
    first = next(seconds for seconds, size in seen if size)
    slow = os.getloadavg()[0] / (
        os.cpu_count() or 1
    )  # what starts in a third of a second alone, beside others takes longer
    assert first < 1.0 + 2 * slow
    pauses = [b - a for (a, _), (b, _) in itertools.pairwise(seen)]
    assert max(pauses, default=0.0) < SECONDS_BETWEEN_LINES + 1 + 2 * slow
    lines = text.splitlines()
    assert lines[0].endswith(" …"), f"what it does when the first line is due: {lines[0]}"
    assert any(re.fullmatch(r"embedding: \d+ so far, [0-3] of 4 archives.*", line) for line in lines), text
    last = [line for line in lines if line.startswith("embedding")][-1]
    assert re.fullmatch(r"embedding: 600 of 600, \d+/s, 14 rejected", last), text
    counts = re.findall(r"embedding: ([\d,]+) of ([\d,]*\d)", text)
    assert {total for _, total in counts} == {"600"}, text
    assert "\x1b" not in text + out
    assert "GPU" not in out
    assert "workers:" not in out


@pytest.mark.parametrize(
    "verb",
    [
        "classify {memory} {image}",
        "evaluate {memory} --leave-one-out",
        "evaluate {memory} {asked}",
        "verify {memory}",
        "index {memory}",
        "copy {memory} {out}",
        "export {memory} {out}",
        "compact {memory}",
        "forget {memory} --label 1 --erase",
        "add {memory} {asked} --dry-run",
        "classify {memory} {asked} --out {out}",
    ],
)
def test_every_long_verb_says_what_it_does(
    digits_memory: VisualMemory, digits: Path, tmp_path: Path, verb: str
) -> None:
    """With lines from the first moment on, a verb says something before it has done anything."""
    memory = shutil.copytree(digits_memory.uri, tmp_path / "memory")
    words = [
        word.format(memory=memory, image=next((digits / "ask/1").iterdir()), asked=digits / "ask", out=tmp_path / "out")
        for word in verb.split(" ")
    ]
    code = (
        "import sys; from jobs.terminal import progress; progress.FIRST_LINE_SECONDS = 0.0\n"
        "from jobs.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"[a-zA-Z ]+( …|: )", done.stderr), done.stderr
