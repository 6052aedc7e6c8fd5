"""Decodes costly images in processes that can be killed. All other images are decoded in a thread of this process.

A thread that decodes cannot be stopped. So another process of this machine decodes images that cost more than
PIXELS_HERE pixels; it is killed when its time is over, and replaced. The standard library's pools cannot end one of
their processes, and they start others by running the caller's main module again. So this is a plain child with two
pipes.
"""

import atexit
import contextlib
import functools
import os
import subprocess
import sys
import threading
import time
from typing import IO, BinaryIO, cast

import numpy as np

from pipeline.embeddings import decoding_process
from pipeline.embeddings.decoding_process import read_message, write_message
from pipeline.embeddings.pixels import ImageFacts, Pixels, pixels_of_bytes
from pipeline.images.decoding.decode import Heavy, Rejected
from pipeline.store.tables.identity import Preprocessing

# The most that one image may cost in a thread of this process: at 10 to 25 ns a pixel, 1.6 s.
PIXELS_HERE = 64_000_000
# Time limit of one image in another process. Images that images/decoding/passes.py accepts take 15 s on a slow core.
LIMIT_SECONDS = 60.0
MAX_PROCESSES = 4  # each can take some 3 GB for an image
_GRACE_SECONDS = 5.0  # past its limit a process that was not killed ends itself after so long


class TooLate(Exception):
    """An image was not decoded within the caller's time limit."""


def pixels_here_or_apart(data: bytes, preprocessing: Preprocessing, *, thumbnails: bool = False) -> Pixels:
    """Decode an image file to pixels: in this thread if that is quick, otherwise in a process. Raises Rejected."""
    try:
        return pixels_of_bytes(data, preprocessing, thumbnails=thumbnails, most=PIXELS_HERE)
    except Heavy:
        return _shared(os.getpid()).pixels_of_bytes(data, preprocessing, thumbnails=thumbnails)


@functools.lru_cache(maxsize=1)
def _shared(_: int) -> "Apart":
    """The Apart of this process. The argument is its pid, so that a fork does not use its parent's."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Apart(min(cpus, MAX_PROCESSES))


class Apart:
    """Decodes in at most `processes` processes, started when needed; safe to use from several threads.

    A `niceness` above 0 makes them yield the CPU cores to other processes.
    """

    def __init__(self, processes: int, niceness: int = 0) -> None:
        self._free = threading.BoundedSemaphore(processes)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._niceness = niceness
        atexit.register(self.close)

    def pixels_of_bytes(
        self, data: bytes, preprocessing: Preprocessing, *, thumbnails: bool = False, seconds: float | None = None
    ) -> Pixels:
        """The same as `pixels.pixels_of_bytes`, to the bit.

        Also raises Rejected if decoding takes longer than LIMIT_SECONDS or ends the process. Raises TooLate if it is
        not done within `seconds`, which include the wait for a free process.
        """
        began = time.monotonic()
        if not self._free.acquire(timeout=seconds):
            raise TooLate
        try:
            left = LIMIT_SECONDS if seconds is None else min(seconds - (time.monotonic() - began), LIMIT_SECONDS)
            if left <= 0:
                raise TooLate
            head, body = self._asked(data, preprocessing, thumbnails=thumbnails, seconds=left, is_own=seconds is None)
        finally:
            self._free.release()
        if "reason" in head:
            raise Rejected(head["stage"], head["reason"])
        side, num_pixels = preprocessing.crop, head["pixels"]
        pixels_SS3 = np.frombuffer(body[:num_pixels], np.uint8).reshape(side, side, 3)
        small = body[num_pixels:] if thumbnails else None
        return Pixels(pixels_SS3, ImageFacts(head["sha256"], head["width"], head["height"], small))

    def _asked(
        self, data: bytes, preprocessing: Preprocessing, *, thumbnails: bool, seconds: float, is_own: bool
    ) -> tuple[dict, bytes]:
        """The answer of a process. A process that does not answer completely is ended."""
        process = self._taken()
        asked = {"preprocessing": preprocessing.model_dump(), "thumbnails": thumbnails}
        asked["seconds"] = seconds + _GRACE_SECONDS
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        answer = None
        try:
            with contextlib.suppress(OSError):  # the process is gone and does not answer
                write_message(_open(process.stdin), asked, data)
                answer = read_message(_open(process.stdout))
        finally:
            timer.cancel()
            if answer is None or killed.is_set():
                _end(process)
        if answer is not None:
            if not killed.is_set():
                self._idle.append(process)
            return answer
        if not killed.is_set():
            raise Rejected("decode", f"it ended the process that decoded it ({_exit_of(process)})")
        if is_own:
            raise Rejected("decode", f"decoding it takes longer than {LIMIT_SECONDS:g} s")
        raise TooLate

    def _taken(self) -> subprocess.Popen[bytes]:
        with contextlib.suppress(IndexError):
            while True:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                _end(process)
        return self._begun()

    def _begun(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [sys.executable, "-W", "ignore", "-m", decoding_process.__name__, str(self._niceness)]
        return subprocess.Popen(  # noqa: S603  # this interpreter and a module of this package
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
        )

    def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            _end(self._idle.pop())


def _open(stream: IO[bytes] | None) -> BinaryIO:
    assert stream is not None  # noqa: S101  # the process was started with pipes
    return cast("BinaryIO", stream)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # data that could not be written is no longer needed
            _open(stream).close()


def _exit_of(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"signal {-code}" if code < 0 else f"status {code}"
