"""Opens copies of a memory of which one file was altered, each in a process of its own, and prints what came of it.

    python -m tests.index.altered MEMORY COPY FIRST LAST [deep]

One line of JSON each for the seeds FIRST to LAST: `file`, `how`, and the `outcome`: "same", "warned", "refused" (with
DamagedFile), "different", "signal N" or what was raised. With `deep` hashes are believed, as those of one who alters a
file and writes the hash anew: then the checks of what the file says are on their own.
"""

import json
import logging
import os
import shutil
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

SECONDS = 60  # each may take
READ = ("index/*/shards/*/*", "tombstones/*", "labels/*", "segments/00000002/entries/*")  # by who answers

Alter = Callable[[bytearray, np.random.Generator], bytearray]


def flipped(content: bytearray, random: np.random.Generator) -> bytearray:
    for at in random.integers(0, len(content), random.integers(1, 9)):
        content[at] ^= 1 << int(random.integers(8))
    return content


def flipped_near_an_end(content: bytearray, random: np.random.Generator) -> bytearray:
    """Headers and footers say where all else lies."""
    near = min(len(content), 400)
    for at in random.integers(0, near, 4):
        content[int(at) if random.integers(2) else len(content) - 1 - int(at)] = int(random.integers(256))
    return content


def zeroed(content: bytearray, random: np.random.Generator) -> bytearray:
    start, length = int(random.integers(len(content))), int(random.integers(1, 5_000))
    gone = len(content[start : start + length])
    content[start : start + gone] = bytes(gone)
    return content


def swapped(content: bytearray, random: np.random.Generator) -> bytearray:
    size = int(random.choice([8, 64, 512]))
    one, other = (int(at) * size for at in random.integers(0, max(len(content) // size, 1), 2))
    if len(content) >= max(one, other) + size:
        content[one : one + size], content[other : other + size] = (
            content[other : other + size],
            content[one : one + size],
        )
    return content


def other_number(content: bytearray, random: np.random.Generator) -> bytearray:
    """An offset, length or count somewhere, where numbers lie that are aligned, most of them near the ends."""
    width, kind = (4, "<i") if random.integers(2) else (8, "<q")
    places = max(len(content) // width - 1, 1)
    place = int(random.integers(min(places, 100))) if random.integers(2) else int(random.integers(places))
    value = int(random.choice([-1, 0, 1 << 8, 1 << 20, (1 << 31) - 1, -(1 << 31)]))
    if width == 8 and random.integers(2):
        value = int(random.choice([1 << 40, (1 << 62), -(1 << 63)]))
    if len(content) >= (place + 1) * width:
        struct.pack_into(kind, content, place * width, value)
    return content


def cut(content: bytearray, random: np.random.Generator) -> bytearray:
    return content[: int(random.integers(len(content)))]


def lengthened(content: bytearray, random: np.random.Generator) -> bytearray:
    return content + random.bytes(int(random.integers(1, 100)))


ALTERATIONS: tuple[Alter, ...] = (flipped, flipped_near_an_end, zeroed, swapped, other_number, cut, lengthened)
OF_SAME_LENGTH = ALTERATIONS[:5]


class Heard(logging.Handler):
    """Remembers which files were warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def answers(memory: Path, heard: Heard) -> tuple[list, bool]:
    """What a memory answers, as text, and whether a warning was heard that a part of it is left out."""
    from pipeline import VisualMemory

    opened = VisualMemory(memory)
    queries = np.random.default_rng(0).normal(size=(5, opened.log.latest().identity.dimension))  # type: ignore[union-attr]
    found = [repr(hits) for hits in opened.search(embeddings=queries.astype(np.float32), k=20)]
    decisions = opened.classify(embeddings=queries.astype(np.float32), k=7)
    found += [repr((each.label, each.votes, each.neighbors)) for each in decisions]
    return found, bool(heard.messages)


def outcome_of(copy: Path, expected: list, path: str, *, deep: bool) -> str:
    """What comes of asking an altered memory, in this process."""
    from pipeline.errors import DamagedFile
    from pipeline.index.search import shard_files
    from pipeline.store.storage import file_refs
    from pipeline.store.tables import schemas

    if deep:
        file_refs.unaltered_path = shard_files.unaltered_path = schemas.unaltered_path = file_refs.check_path
    heard = Heard()
    logging.getLogger().addHandler(heard)
    try:
        found, warned = answers(copy, heard)
    except DamagedFile as error:
        return "refused" if path in str(error) else f"refused for another file: {error}"
    if found == expected:
        return "same"
    if warned:
        return "warned" if any(path in message for message in heard.messages) else "warned of another file"
    return "different"


def in_a_process(work: Callable[[], object]) -> object:
    """What a function returns in a process of its own, or "signal N"."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        import signal

        signal.alarm(SECONDS)
        try:
            said: object = work()
        except BaseException as error:  # whatever it is, it was not foreseen
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        os.write(writer, json.dumps(said).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said_of = stream.read()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else json.loads(said_of)


def main(memory: Path, copy: Path, first: int, last: int, *, deep: bool) -> None:
    import faiss  # noqa: F401  # once for all, and no thread of it is started before a fork

    import pipeline.index.search.live_entries
    import pipeline.index.search.open_blocks
    import pipeline.visual_memory  # noqa: F401

    shutil.copytree(memory, copy)
    names = sorted(path.relative_to(copy).as_posix() for pattern in READ for path in copy.glob(pattern))
    expected = in_a_process(lambda: answers(copy, Heard())[0])
    assert isinstance(expected, list), expected
    for seed in range(first, last):
        random = np.random.default_rng(seed)
        name = names[seed % len(names)]
        alter = (OF_SAME_LENGTH if deep else ALTERATIONS)[int(random.integers(5 if deep else 7))]
        path = copy / name
        content = altered = path.read_bytes()
        while altered == content:
            altered = bytes(alter(bytearray(content), random))
        try:
            path.write_bytes(altered)
            outcome = in_a_process(lambda name=name: outcome_of(copy, expected, name, deep=deep))  # type: ignore[misc]
        finally:
            path.write_bytes(content)
        print(json.dumps({"seed": seed, "file": name, "how": alter.__name__, "outcome": outcome}), flush=True)


if __name__ == "__main__":
    _, of, to, *numbers = sys.argv
    main(Path(of), Path(to), int(numbers[0]), int(numbers[1]), deep="deep" in numbers)
