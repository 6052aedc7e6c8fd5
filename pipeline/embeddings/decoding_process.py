"""A process that decodes for its parent, which can kill it: `python -m pipeline.embeddings.decoding_process`.

It reads requests from standard input and writes answers to standard output. Each has a head of JSON and a body of
bytes. The process ends when its input ends. A timer ends it when a request takes longer than allowed. So it never
outlives its parent. It loads neither torch nor Ray.
"""

import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

from pipeline.embeddings.pixels import pixels_of_bytes
from pipeline.images.decoding.decode import Rejected
from pipeline.store.tables.identity import Preprocessing

# Memory on top of what the process has at its start: an image with the most pixels takes 0.7 GB as RGB, and 2.7 GB
# while a WebP is decoded.
MAX_MEMORY_BYTES = 4 << 30

_LENGTHS = struct.Struct(">IQ")


def write_message(stream: BinaryIO, head: dict[str, Any], *bodies: bytes) -> None:
    """Write a head of JSON and its bodies. Raises OSError."""
    text = json.dumps(head).encode()
    stream.write(_LENGTHS.pack(len(text), sum(map(len, bodies))) + text)
    for body in bodies:
        stream.write(body)
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read a head and a body; None if the stream ends."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    head_bytes, body_bytes = _LENGTHS.unpack(lengths)
    head, body = stream.read(head_bytes), stream.read(body_bytes)
    return (json.loads(head), body) if len(head) == head_bytes and len(body) == body_bytes else None


def main() -> None:
    """Answer requests until there are no more. The only argument is the niceness of the process."""
    os.nice(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but answers may be written to standard output
    _limit_memory()
    while (message := read_message(sys.stdin.buffer)) is not None:
        asked, data = message
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        bodies: tuple[bytes, ...]
        try:
            found = pixels_of_bytes(data, Preprocessing(**asked["preprocessing"]), thumbnails=asked["thumbnails"])
            facts, pixels = found.facts, found.pixels_SS3.tobytes()
            head = {"sha256": facts.sha256, "width": facts.width, "height": facts.height, "pixels": len(pixels)}
            bodies = (pixels,) if facts.thumbnail is None else (pixels, facts.thumbnail)
        except Rejected as rejected:
            head, bodies = {"stage": rejected.stage, "reason": rejected.reason}, ()
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_message(answers, head, *bodies)


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            has = int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:  # only Linux has this file, and only there the limit has an effect
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = has + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


if __name__ == "__main__":
    main()
