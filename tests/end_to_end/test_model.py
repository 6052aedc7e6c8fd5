"""A memory under random edits by writers that are killed at random moments, beside a dictionary that does the same.

Every operation runs in a process of its own, or in two at once, and is killed or not. What it came to is read from the
log of versions; the dictionary follows, and memory and dictionary must agree, at every version, to the last similarity.
"""

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import VisualMemory
from pipeline.store.log.state import BreakLeases, FoldSingles
from tests.end_to_end.writer import ENCODER, IMAGE_SIZE
from tests.store.seaweed import SeaweedFS

NUM_SOURCES, NUM_SINGLES = 3, 4
K = 500  # more than any of these memories holds: a search returns all that is live
SECONDS_AT_FIRST = {"add": 0.3, "single": 0.1, "forget": 0.1, "erase": 0.4, "relabel": 0.1}
CLOCK = random.SystemRandom()  # hypothesis prefers odd values, and a kill should come at any moment
PHASES = ("planning", "writing", "committing")


@dataclass(frozen=True)
class Entry:
    """One remembered image of the model; `via` is how it was embedded, which decides its last bits."""

    uri: str
    dataset: str
    source: str
    label: str
    via: str


@dataclass
class Model:
    """What the memory should be: live entries and forgotten ones, now and at each version that can be read."""

    live: list[Entry] = field(default_factory=list)
    forgotten: list[Entry] = field(default_factory=list)
    past: dict[int, tuple[list[Entry], list[Entry]]] = field(default_factory=dict)

    def apply(self, operation: dict, images: "Images", command: str) -> None:
        match operation["do"]:
            case "add":
                self.live += images.entries_of(operation["source"])
            case "forget":
                self.forgotten += [entry for entry in self.live if entry.uri == operation["uri"]]
                self.live = [entry for entry in self.live if entry.uri != operation["uri"]]
            case "erase":
                self.erase(operation["uri"])
            case "relabel":
                self.live = [
                    Entry(e.uri, e.dataset, e.source, operation["label"], e.via) if e.uri == operation["uri"] else e
                    for e in self.live
                ]
            case "rollback":
                live, forgotten = self.past[int(command.split()[-1])]
                self.live, self.forgotten = list(live), list(forgotten)

    def erase(self, uri: str) -> None:
        def without(entries: list[Entry]) -> list[Entry]:
            return [entry for entry in entries if entry.uri != uri]

        self.live, self.forgotten = without(self.live), without(self.forgotten)
        self.past = {version: (without(live), without(gone)) for version, (live, gone) in self.past.items()}

    def changes(self, operation: dict) -> bool | None:
        """Whether carrying it out commits a version; None where that depends on more than the model knows."""
        match operation["do"]:
            case "add":
                source = operation["source"]
                if source.endswith(".png"):
                    label = Path(source).parent.name
                    return not any(e.uri == source and e.label == label and e.dataset == label for e in self.live)
                return not any(e.source == source for e in self.live)
            case "forget":
                return any(e.uri == operation["uri"] for e in self.live)
            case "erase":
                everything = [*self.live, *self.forgotten]
                everything += [e for live, gone in self.past.values() for e in (*live, *gone)]
                return any(e.uri == operation["uri"] for e in everything)
            case "relabel":
                return any(e.uri == operation["uri"] and e.label != operation["label"] for e in self.live)
        return None


@dataclass
class Images:
    """Folders of images and single images to remember, and the vector of each by the way it is embedded."""

    folders: list[str]
    singles: list[str]
    vectors: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    @property
    def uris(self) -> list[str]:
        return [*(str(path) for folder in self.folders for path in sorted(Path(folder).rglob("*.png"))), *self.singles]

    def entries_of(self, source: str) -> list[Entry]:
        if source.endswith(".png"):
            folder = Path(source).parent.name
            return [Entry(source, folder, source, folder, "single")]
        paths = sorted(Path(source).rglob("*.png"))
        return [Entry(str(path), Path(source).name, source, path.parent.name, "folder") for path in paths]


class Writers:
    """The process that forks writers."""

    def __init__(self, weights: str, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.writer", weights],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert json.loads(self._process.stdout.readline()) == {"ready": True}  # type: ignore[union-attr]

    def start(self, uri: str, operations: list[dict]) -> tuple[int, Path]:
        self._count += 1
        journal = self._folder / f"journal-{self._count}"
        request = {"run": {"uri": uri, "operations": operations, "journal": str(journal)}}
        return self._ask(request)["pid"], journal

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})["status"]

    def end(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(timeout=30)

    def _ask(self, request: dict) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return json.loads(self._process.stdout.readline())  # type: ignore[union-attr]


def read_journal(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def phase_of(journal: list[dict]) -> str:
    """Where a kill met an operation: by the file it was publishing, or had published last."""
    files = [note for note in journal if "file" in note or "published" in note]
    files = [note for note in files if not str(note.get("file") or note.get("published")).startswith("leases/")]
    if not files:
        return "planning" if journal else "starting"
    last = files[-1]
    path = str(last.get("file") or last.get("published"))
    if path.startswith("versions/") and last.get("by") == "create":
        return "committing"
    if path.startswith("versions/"):
        return "finishing"
    if "/plan/" in path or path.endswith("segment.json"):
        return "planning"
    return "writing"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)

    def draw(path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 255, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(path)
        return str(path)

    for source in range(NUM_SOURCES):
        for number in range(4):
            draw(root / f"source{source}" / "ab"[number % 2] / f"{number}.png")
    singles = [draw(root / "singles" / "c" / f"{number}.png") for number in range(NUM_SINGLES)]
    draw(root / "base" / "a" / "base.png")
    return Images([str(root / f"source{source}") for source in range(NUM_SOURCES)], singles)


@pytest.fixture(scope="module")
def base(images: Images, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of one image, from which every sequence starts; and the vectors of all images, from other memories."""
    root = tmp_path_factory.mktemp("base")
    options = {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}
    first = str(Path(images.singles[0]).parents[2] / "base")
    VisualMemory(root / "memory").add(first, **options)  # type: ignore[arg-type]
    for via, sources in (("folder", [first, *images.folders]), ("single", images.singles)):
        shutil.copytree(root / "memory", root / via)
        memory = VisualMemory(root / via)
        for source in sources:
            memory.add(source)
        live = memory.live()
        for uri in [f"{first}/a/base.png", *images.uris]:
            found = live.matching(uri=uri)
            if len(found):
                images.vectors[via, uri] = live.vectors_of(found[:1])[0]
    return root / "memory"


@pytest.fixture(scope="module")
def writers(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writers]:
    started = Writers(weights, tmp_path_factory.mktemp("journals"))
    yield started
    started.end()


def single_operations() -> st.SearchStrategy[dict]:
    source = st.integers(0, NUM_SOURCES - 1)
    single = st.integers(0, NUM_SINGLES - 1)
    any_uri = st.integers(0, 4 * NUM_SOURCES + NUM_SINGLES - 1)
    return st.one_of(
        st.fixed_dictionaries({"do": st.just("add"), "folder": source}),
        st.fixed_dictionaries({"do": st.just("add"), "single": single}),
        st.fixed_dictionaries({"do": st.just("relabel"), "target": any_uri, "label": st.sampled_from("abd")}),
        st.fixed_dictionaries({"do": st.just("forget"), "target": any_uri}),
        st.fixed_dictionaries({"do": st.just("erase"), "target": any_uri}),
        st.fixed_dictionaries({"do": st.just("compact")}),
        st.fixed_dictionaries({"do": st.just("rollback"), "back": st.integers(0, 30)}),
        st.fixed_dictionaries({"do": st.just("expire"), "keep": st.integers(1, 6)}),
    )


@dataclass(frozen=True)
class Step:
    """Operations begun together, one or two by writers at once; whether they are killed, and then begun again."""

    operations: tuple[dict, ...]
    kill: bool
    again: bool


def steps() -> st.SearchStrategy[Step]:
    together = st.lists(single_operations(), min_size=1, max_size=2).map(tuple)
    return st.builds(Step, together, st.sampled_from([True, True, False]), st.booleans())


class Story:
    """One sequence of steps on one memory."""

    seconds: ClassVar[dict[str, float]] = dict(SECONDS_AT_FIRST)
    kills: ClassVar[Counter[str]] = Counter()
    refusals: ClassVar[Counter[str]] = Counter()

    def __init__(self, uri: str, images: Images, writers: Writers) -> None:
        self.uri, self.images, self.writers = uri, images, writers
        self.model = Model()
        self.names: dict[str, dict] = {}
        self.dirty = False  # something was killed since the last clean-up: refusals are to be expected
        [base] = self.images.entries_of(str(Path(images.singles[0]).parents[2] / "base"))
        self.model.live.append(base)
        self.seen = VisualMemory(uri).log.retained()[-1]
        self.model.past[self.seen] = (list(self.model.live), [])

    def take(self, step: Step) -> None:
        operations = [self._concrete(operation) for operation in step.operations]
        if len(operations) == 2 and self._touch_the_same(*operations):
            operations = operations[:1]
        self._run(operations, kill=step.kill)
        if step.kill and step.again:
            missing = [o for o in operations if o["name"] not in self.names or not self.names[o["name"]].get("done")]
            if missing:
                self._run([self._renamed(missing[0])], kill=False)

    def _run(self, operations: list[dict], *, kill: bool) -> None:
        expected = [self.model.changes(operation) for operation in operations]
        began = time.monotonic()
        started = [self.writers.start(self.uri, [operation]) for operation in operations]
        killed = set()
        if kill:
            time.sleep(CLOCK.uniform(0, 0.8 * max(self.seconds.get(self._kind(o), 0.2) for o in operations)))
            for pid, _ in started:
                os.kill(pid, signal.SIGKILL)
        for pid, _ in started:
            if os.WIFSIGNALED(self.writers.wait(pid)):
                killed.add(pid)
        took = time.monotonic() - began
        committed = self._follow()
        for (pid, path), operation, changes in zip(started, operations, expected, strict=True):
            journal = read_journal(path)
            failed = [note["failed"] for note in journal if "failed" in note]
            assert not failed, failed[0]
            if pid in killed:
                self.dirty = True
                self.kills[phase_of(journal)] += 1
                continue
            assert {"end": operation["name"]} in journal
            refused = [note["why"] for note in journal if "refused" in note]
            self.refusals[" ".join(refused)[:60]] += 1
            if len(operations) == 1 and not self.dirty and changes is not None:
                assert (operation["name"] in committed) == changes, (operation, refused)
            if len(operations) == 1 and not kill:
                kind = self._kind(operation)
                self.seconds[kind] = 0.9 * self.seconds.get(kind, took) + 0.1 * took
        self._agree(None)

    def _follow(self) -> set[str]:
        """Let the model do what was committed, in the order it was."""
        log = VisualMemory(self.uri).log
        kept = log.retained()
        done = set()
        for commit in log.commits(range(self.seen + 1, kept[-1] + 1)):
            auxiliary = all(isinstance(action, FoldSingles | BreakLeases) for action in commit.actions)
            if not auxiliary:
                name = commit.command.split()[0]
                operation = self.names[name]
                assert not operation.get("done"), f"{name} was committed twice"
                self.model.apply(operation, self.images, commit.command)
                operation["done"] = True
                done.add(name)
            self.model.past[commit.version] = (list(self.model.live), list(self.model.forgotten))
        self.seen = kept[-1]
        self.model.past = {version: then for version, then in self.model.past.items() if version in kept}
        return done

    def finish(self) -> None:
        """Clean up, verify, and compare every version."""
        memory = VisualMemory(self.uri)
        report = memory.verify(clean=True)
        assert report.sound, [str(finding) for finding in report.findings]
        assert not report.findings, [str(finding) for finding in report.findings]
        self._follow()
        assert list(self.model.past) == list(memory.log.retained())
        for version in self.model.past:
            self._agree(version)
        self._agree(None)

    def _agree(self, version: int | None) -> None:
        live = self.model.live if version is None else self.model.past[version][0]
        memory = VisualMemory(self.uri, at=version)
        queries_QD = np.stack(list(self.images.vectors.values())[:: len(self.images.vectors) // 3]).astype(np.float32)
        queries_QD /= np.linalg.norm(queries_QD, axis=1, keepdims=True)
        for query, neighbors in zip(queries_QD, memory.search(embeddings=queries_QD, k=K), strict=True):
            told = sorted((n.uri, n.dataset, n.label, n.similarity) for n in neighbors)
            assert told == sorted((e.uri, e.dataset, e.label, self._similarity(query, e)) for e in live)
            assert [n.similarity for n in neighbors] == sorted((n.similarity for n in neighbors), reverse=True)
        if live:
            [decision] = memory.classify(embeddings=queries_QD[:1], k=K, voting="plurality")
            counts = Counter(entry.label for entry in live)
            assert decision.votes == pytest.approx({label: n / len(live) for label, n in counts.items()})

    def _similarity(self, query_D: np.ndarray, entry: Entry) -> float:
        unit_D = query_D.astype(np.float64)
        unit_D = (unit_D / np.linalg.norm(unit_D)).astype(np.float32).astype(np.float64)
        stored_D = self.images.vectors[entry.via, entry.uri].astype(np.float64)
        return float(np.float32(np.einsum("d,d->", stored_D, unit_D)))

    def _concrete(self, operation: dict) -> dict:
        operation = dict(operation)
        if "folder" in operation:
            operation["source"] = self.images.folders[operation["folder"]]
        if "single" in operation:
            operation["source"] = self.images.singles[operation["single"]]
        if "target" in operation:
            operation["uri"] = self.images.uris[operation["target"]]
        return self._renamed(operation)

    def _renamed(self, operation: dict) -> dict:
        operation = {key: value for key, value in operation.items() if key != "done"}
        operation["name"] = f"operation-{len(self.names)}"
        self.names[operation["name"]] = operation
        return operation

    def _touch_the_same(self, one: dict, other: dict) -> bool:
        """Whether the outcome would depend on which of two writers looked first."""
        if {one["do"], other["do"]} & {"rollback", "expire"}:
            return True
        touched = [
            {e.uri for e in self.images.entries_of(o["source"])} if "source" in o else {o.get("uri")}
            for o in (one, other)
        ]
        return bool((touched[0] & touched[1]) - {None})

    def _kind(self, operation: dict) -> str:
        return "single" if "single" in operation else operation["do"]


def tell(story: list[Step], made: Story) -> None:
    for step in story:
        made.take(step)
    made.finish()


def assert_kills_met_every_phase() -> None:
    print(f"kills: {dict(Story.kills)}; refusals: {dict(Story.refusals)}; seconds: {Story.seconds}")
    assert all(Story.kills[phase] for phase in PHASES), Story.kills


RANDOM_STORIES = settings(
    max_examples=200,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_two_hundred_killed_sequences(base: Path, images: Images, writers: Writers, tmp_path: Path) -> None:
    Story.kills.clear()

    @RANDOM_STORIES
    @given(st.lists(steps(), min_size=4, max_size=9))
    def tell_one(story: list[Step]) -> None:
        place = tmp_path / f"memory-{secrets.token_hex(8)}"
        shutil.copytree(base, place)
        tell(story, Story(str(place), images, writers))
        shutil.rmtree(place)

    tell_one()
    assert_kills_met_every_phase()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_sequences_on_s3(base: Path, images: Images, weights: str, s3: SeaweedFS, tmp_path: Path) -> None:
    Story.kills.clear()
    writers = Writers(weights, tmp_path)

    @settings(RANDOM_STORIES, max_examples=12)
    @given(st.lists(steps(), min_size=4, max_size=7))
    def tell_one(story: list[Step]) -> None:
        uri = s3.uri()
        VisualMemory(base).copy(uri)
        tell(story, Story(uri, images, writers))

    tell_one()
    writers.end()
    assert sum(Story.kills.values()) > 0


def test_a_few_killed_sequences(base: Path, images: Images, writers: Writers, tmp_path: Path) -> None:
    @settings(RANDOM_STORIES, max_examples=4)
    @given(st.lists(steps(), min_size=4, max_size=6))
    def tell_one(story: list[Step]) -> None:
        place = tmp_path / f"memory-{secrets.token_hex(8)}"
        shutil.copytree(base, place)
        tell(story, Story(str(place), images, writers))

    tell_one()


@pytest.mark.parametrize("limit", [60, 2_500, 12_000])
def test_a_disk_that_fills_midway_damages_nothing(
    base: Path, images: Images, writers: Writers, tmp_path: Path, limit: int
) -> None:
    """Every edit meets a full disk after so many bytes of some file, and succeeds once there is room."""
    place = tmp_path / "memory"
    shutil.copytree(base, place)
    story = Story(str(place), images, writers)
    told = ""
    for operation in (
        {"do": "add", "folder": 0},
        {"do": "add", "single": 0},
        {"do": "relabel", "target": 0, "label": "d"},
        {"do": "forget", "target": 1},
        {"do": "erase", "target": 1},
        {"do": "erase", "target": 2},
        {"do": "compact"},
        {"do": "rollback", "back": 3},
        {"do": "expire", "keep": 2},
    ):
        story.dirty = True
        story.refusals.clear()
        story._run([story._concrete(operation | {"limit": limit})], kill=False)
        told += "".join(story.refusals)
        if not list(story.names.values())[-1].get("done"):
            story._run([story._concrete(operation)], kill=False)
    story.finish()
    assert "[Errno 27]" in told  # EFBIG; a disk without room says ENOSPC at the same place
