"""Decoding in processes that can be killed: the same pixels, within a time, and whatever happens to the process."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.embeddings import apart, decoding_process
from pipeline.embeddings.apart import Apart, TooLate, pixels_here_or_apart
from pipeline.embeddings.decoding import BatchForm, Threads
from pipeline.embeddings.pixels import pixels_of_bytes
from pipeline.images.containers.items import Item
from pipeline.images.decoding.decode import Rejected
from pipeline.store.tables.identity import Preprocessing
from tests.images import bombs

FORM = Preprocessing(resize=40, crop=32, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ROOT = Path(__file__).parents[2]


@pytest.fixture
def processes() -> Iterator[Apart]:
    made = Apart(2)
    yield made
    made.close()


def photo(kind: str = "JPEG", side: int = 90) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (side, side + 20, 3), dtype=np.uint8)
    return bombs.saved(Image.fromarray(noise), kind)


def pid_of(processes: Apart) -> int:
    return processes._idle[-1].pid


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("thumbnails", [True, False])
def test_pixels_are_the_same_to_the_bit(processes: Apart, kind: str, thumbnails: bool) -> None:
    data = photo(kind)
    here = pixels_of_bytes(data, FORM, thumbnails=thumbnails)
    there = processes.pixels_of_bytes(data, FORM, thumbnails=thumbnails)
    assert (here.pixels_SS3 == there.pixels_SS3).all()
    assert here.facts == there.facts


def test_a_rejected_image_is_rejected_for_the_same_reason(processes: Apart) -> None:
    for data in (b"no image", bombs.jpeg_of_scans(8, 600)):
        with pytest.raises(Rejected) as here:
            pixels_of_bytes(data, FORM)
        with pytest.raises(Rejected) as there:
            processes.pixels_of_bytes(data, FORM)
        assert (here.value.stage, here.value.reason) == (there.value.stage, there.value.reason)


def test_what_takes_too_long_is_killed_and_the_next_is_answered(processes: Apart) -> None:
    processes.pixels_of_bytes(photo(), FORM)
    slow, victim = bombs.jpeg_of_scans(2_500, 400), pid_of(processes)
    began = time.monotonic()
    with pytest.raises(TooLate):
        processes.pixels_of_bytes(slow, FORM, seconds=0.3)
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)
    assert processes.pixels_of_bytes(photo(), FORM).facts.width == 110


def test_whoever_waits_for_a_process_waits_no_longer_than_its_time() -> None:
    processes = Apart(1)
    slow = bombs.jpeg_of_scans(2_500, 400)

    def ask() -> None:
        with contextlib.suppress(TooLate):
            processes.pixels_of_bytes(slow, FORM, seconds=4)

    busy = threading.Thread(target=ask)
    busy.start()
    until = time.monotonic() + 30
    while processes._free._value and time.monotonic() < until:  # the one process is not taken yet
        time.sleep(0.01)
    with pytest.raises(TooLate):
        processes.pixels_of_bytes(photo(), FORM, seconds=0.2)
    busy.join()
    processes.close()


def test_an_image_that_takes_longer_than_an_add_bears_is_rejected(
    processes: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "LIMIT_SECONDS", 0.3)
    with pytest.raises(Rejected, match=r"longer than 0\.3 s"):
        processes.pixels_of_bytes(bombs.jpeg_of_scans(2_500, 400), FORM)


def test_a_process_that_crashes_rejects_its_image_only(processes: Apart) -> None:
    processes.pixels_of_bytes(photo(), FORM)
    victim = pid_of(processes)
    killer = threading.Timer(0.3, lambda: os.kill(victim, signal.SIGSEGV))
    killer.start()
    with pytest.raises(Rejected, match="ended the process that decoded it"):
        processes.pixels_of_bytes(bombs.jpeg_of_scans(2_500, 400), FORM)
    killer.join()
    assert processes.pixels_of_bytes(photo(), FORM).facts.width == 110


def test_a_process_that_died_while_it_had_nothing_to_do_is_replaced(processes: Apart) -> None:
    processes.pixels_of_bytes(photo(), FORM)
    os.kill(pid_of(processes), signal.SIGKILL)
    processes._idle[-1].wait()
    assert processes.pixels_of_bytes(photo(), FORM).facts.width == 110


def test_a_process_that_nobody_kills_ends_itself() -> None:
    """Whoever began it may have been killed itself."""
    command = [sys.executable, "-m", decoding_process.__name__, "0"]
    asked = {"preprocessing": FORM.model_dump(), "thumbnails": False, "seconds": 0.3}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        decoding_process.write_message(process.stdin, asked, bombs.jpeg_of_scans(2_500, 400))
        assert process.wait(30) == -signal.SIGALRM


def test_memory_beyond_the_limit_rejects_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from pipeline.embeddings import decoding_process as own\n"
        "own.MAX_MEMORY_BYTES = 60 << 20; own.main()"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "0"]
    asked = {"preprocessing": FORM.model_dump(), "thumbnails": False, "seconds": 60}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for data, is_taken in ((photo(), True), (bombs.lossless_webp(5_000), False), (photo(), True)):
            decoding_process.write_message(process.stdin, asked, data)
            answer = decoding_process.read_message(process.stdout)
            assert answer is not None
            assert ("sha256" in answer[0]) == is_taken, answer[0]
        process.stdin.close()
        assert process.wait(30) == 0


def test_a_process_that_decodes_loads_neither_torch_nor_ray() -> None:
    code = f"import sys, {decoding_process.__name__}; print({{'torch', 'timm', 'ray', 'faiss'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_what_is_quick_is_decoded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a process was asked for")

    monkeypatch.setattr(Apart, "pixels_of_bytes", no_process)
    assert pixels_here_or_apart(photo(), FORM).facts.width == 110
    monkeypatch.setattr(apart, "PIXELS_HERE", 100)
    with pytest.raises(AssertionError):
        pixels_here_or_apart(photo(), FORM)


def test_an_add_passes_over_images_that_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(apart, "PIXELS_HERE", 1_000_000)
    apart._shared.cache_clear()
    slow, good = bombs.jpeg_of_scans(2_500, 400), photo()
    items = [
        Item(f"/{row}.jpg", None, data) for row, data in enumerate((good, slow, bombs.jpeg_of_scans(8, 600), good))
    ]
    [batch] = Threads(2).batches(items, BatchForm(4, FORM))
    first, too_long, too_many, last = batch.images
    assert first == last
    assert isinstance(too_long, Rejected)
    assert too_long.reason == "decoding it takes longer than 1 s"
    assert isinstance(too_many, Rejected)
    assert "more than 500 scans" in too_many.reason
    assert not batch.pixels_BSS3[1:3].any()


def test_files_out_of_containers_are_not_all_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a tar that decompresses to a thousand times its size."""
    monkeypatch.setattr("pipeline.embeddings.decoding.BYTES_AHEAD", 1 << 20)
    alive = 0
    most = 0

    class Content(bytes):
        def __new__(cls) -> "Content":
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, 400_000)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    items = (Item(f"/a.tar#{row}.png", None, Content()) for row in range(64))
    for batch in Threads(1).batches(items, BatchForm(16, FORM)):
        assert all(isinstance(image, Rejected) for image in batch.images)
        assert all(item.content is None for item in batch.items)
    assert most <= 6
