"""Actors that die: their parts are run again, and not for ever. Nodes that die: tests/end_to_end/test_rehearsal.py."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.embeddings import on_ray
from pipeline.embeddings.parts import Worker
from pipeline.errors import WorkerError
from pipeline.store.segments.part_marks import PartMark
from tests.conftest import ENCODER, IMAGE_SIZE

NUM_IMAGES = 1_500


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        path = tmp_path / "pictures" / f"{number % 3}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


def actors() -> set[int]:
    """Embedding actors below this process."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                command, status = (Path(f"/proc/{name}/{file}").read_bytes() for file in ("cmdline", "stat"))
            except OSError:
                continue
            if b"EmbedParts" in command and status.rpartition(b")")[2].split()[0] != b"Z" and _is_ours(int(name)):
                found.add(int(name))
    return found


def _is_ours(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    return False


def add(memory: VisualMemory, source: Path, weights: str, meanwhile: Callable[[threading.Event], None]) -> object:
    """An add on Ray, with something going on beside it."""
    from jobs.ray_cluster.on_ray import start_ray

    start_ray()
    over = threading.Event()
    beside = threading.Thread(target=meanwhile, args=(over,))
    beside.start()
    try:
        return memory.add(
            source,
            encoder=ENCODER,
            weights=weights,
            weights_order="positional",
            image_size=IMAGE_SIZE,
            runner="ray",
        )
    finally:
        over.set()
        beside.join()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_parts_of_an_actor_that_is_killed_are_run_again(tmp_path: Path, source: Path, weights: str) -> None:
    memory = VisualMemory(tmp_path / "memory")
    killed: list[int] = []

    def kill_one(over: threading.Event) -> None:
        while not over.wait(0.1) and not killed:
            if list((tmp_path / "memory").glob("segments/*/done/*")) and (pids := actors()):
                killed.append(min(pids))
                os.kill(killed[0], signal.SIGKILL)

    report = add(memory, source, weights, kill_one)
    assert len(killed) == 1
    assert (report.entries, report.rejected) == (NUM_IMAGES, 0)  # type: ignore[attr-defined]
    assert memory.verify().sound


class Crashing:
    """An embedder for which one of the images of part 1 is too much."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def do(self, part: int) -> PartMark:
        if part == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._worker.do(part)

    def described(self, part: int) -> str:
        return self._worker.described(part)


class EmbedOrCrash(on_ray.EmbedParts):
    def _done(self, worker: Worker, part: int) -> PartMark:
        return super()._done(Crashing(worker), part)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_part_that_ends_its_actor_each_time_ends_the_add_which_can_go_on(
    tmp_path: Path, source: Path, weights: str
) -> None:
    memory = VisualMemory(tmp_path / "memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_ray, "EmbedParts", EmbedOrCrash)
        with pytest.raises(WorkerError, match="part 1 ended .* 4 times: one of images 128 to 255 of "):
            add(memory, source, weights, lambda _: None)
    report = add(memory, source, weights, lambda _: None)
    assert (report.entries, report.rejected) == (NUM_IMAGES, 0)  # type: ignore[attr-defined]
    assert report.segment == 1  # type: ignore[attr-defined]
