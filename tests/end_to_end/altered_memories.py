"""Small memories, altered in every way somebody might: bytes, fields, names, links; each asked, checked and changed.

    python -m tests.end_to_end.altered_memories --count 1000 --seed 7 [--only bytes] [--without-shards]

Every altered copy is used by a process of its own. What goes wrong is printed, a JSON object a line, and counted in the
exit status: a process that ends by a signal or hangs, anything read, written or removed outside of the memory, an
answer that is another than before without a word about it, or an error nobody foresaw.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import logging
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import VisualMemory
from pipeline.errors import VisualMemoryError
from pipeline.index.build.plan import IndexOptions
from pipeline.store.storage import leases, local
from pipeline.store.storage.local import LocalStorage
from tests.conftest import unit
from tests.edits.erasing import DAMAGED, DIMENSION, Item, item, items, remember, teach
from tests.store.dying import Died, DyingStorage, bury
from tests.store.untrusted import Outside, rewritten

# What verbs import when they are first called, which each fork would do anew.
for module in (
    "pipeline.edits.clean",
    "pipeline.edits.erasure.erase",
    "pipeline.edits.index_growth",
    "pipeline.edits.erasure.proof",
    "pipeline.edits.erasure.redact",
    "pipeline.store.segments.unfinished_adds",
    "pipeline.index.verify",
    "pipeline.store.checks.verify",
    "pyarrow.pandas_compat",
):
    importlib.import_module(module)

SECONDS = 60  # for all verbs on one memory, which takes one or two
QUERIES = unit(np.random.default_rng(5).normal(size=(4, DIMENSION)))
MOST_BYTES = 12 << 30  # of address space, of which little is in use
BYTES_CHANGED = (1, 2, 8, 64)

# inotify(7): whatever is done to a file or to a folder that is watched
_EVENTS = 0x00000FFF
_IN_ISDIR = 0x40000000
_IN_NONBLOCK = 0o4000


# The memories that are altered


def told(root: Path) -> VisualMemory:
    """A memory with files of every kind."""
    memory = VisualMemory(root)
    remember(memory, [*items("base", 40), Item("/base/damaged.png", DAMAGED)], "base", thumbnails=True)
    memory.forget(uris=["/base/7.png"])
    teach(memory, items("single", 5))
    memory.index(IndexOptions(key="Flat", shard_rows=30))
    remember(memory, items("later", 20), "later")
    memory.relabel(ids=memory.live().live_ids()[:3].tolist(), label="fox")
    memory.relabel(label_set="size", map={"fox": "small", "cat": "small", "dog": "large", "eel": "large"})
    teach(memory, [item("/one more.png", "cat")])
    remember(memory, items("begun", 10), "begun", finished=False)
    return memory


def expired(root: Path) -> None:
    """With packs, a checkpoint, and an index of another kind."""
    memory = told(root)
    memory.compact()
    memory.index(IndexOptions(key="IVF2,SQfp16", target_recall=0.1, rebuild=True))
    memory.expire(2)
    memory.forget(labels=["eel"])


def killed_erasing(root: Path) -> None:
    """With an erasure that was committed and killed, and the lease of the dead."""
    told(root)
    for changes in range(12, 200, 3):
        shutil.copytree(root, root.with_name("trial"))
        memory = VisualMemory(root.with_name("trial"))
        memory.log.storage = DyingStorage(root.with_name("trial"), changes)
        try:
            memory.forget(labels=["dog"], erase=True)
        except Died:
            state = VisualMemory(root.with_name("trial")).log.latest()
            if state.erasures:
                shutil.rmtree(root)
                root.with_name("trial").rename(root)
                return
        shutil.rmtree(root.with_name("trial"))
    raise AssertionError("no erasure was killed after its commit")


def first_add(root: Path) -> None:
    """Without a version yet."""
    memory = VisualMemory(root)
    remember(memory, items("begun", 20), "begun", finished=False)
    with_lease = LocalStorage(root)
    leases.Lease(with_lease, "add").__enter__()
    bury(with_lease)


BASES: dict[str, Callable[[Path], object]] = {
    "told": told,
    "expired": expired,
    "killed erasing": killed_erasing,
    "first add": first_add,
}


# How they are altered


@dataclass
class Altered:
    """What was altered. Of a `lie` an answer may differ: whoever can seal a version anew can say what he likes."""

    kind: str
    path: str
    what: str
    lie: bool = False
    base: str = ""


def files_of(root: Path, chance: random.Random, pattern: str = "*") -> Path:
    """A file, each folder as likely as another."""
    by_kind: dict[str, list[Path]] = {}
    for path in sorted(root.rglob(pattern)):
        if path.is_file():
            parts = path.relative_to(root).parts
            by_kind.setdefault(f"{parts[0]}/{parts[2] if len(parts) > 3 else ''}/{path.suffix}", []).append(path)
    return chance.choice(by_kind[chance.choice(sorted(by_kind))])


def alter_bytes(root: Path, outside: Path, chance: random.Random) -> Altered:
    path = files_of(root, chance)
    data = bytearray(path.read_bytes())
    changed = chance.choice(BYTES_CHANGED)
    # Lengths and offsets stand at the ends of a file, and are met seldom otherwise.
    near = chance.choice((len(data), 256, 2_048))
    for _ in range(changed):
        if data:
            at = chance.randrange(min(near, len(data)))
            at = at if chance.random() < 0.5 else len(data) - 1 - at
            data[at] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
    path.write_bytes(data)
    return Altered("bytes", str(path.relative_to(root)), f"{changed} bytes")


def alter_length(root: Path, outside: Path, chance: random.Random) -> Altered:
    path = files_of(root, chance)
    data = path.read_bytes()
    kind = chance.choice(("empty", "cut", "longer", "twice", "zeros", "another"))
    if kind == "cut":
        data = data[: chance.randrange(len(data) + 1)]
    elif kind == "longer":
        data += chance.randbytes(chance.randrange(1, 5_000))
    elif kind == "another":
        data = files_of(root, chance).read_bytes()
    else:
        data = {"empty": b"", "twice": data * 2, "zeros": bytes(len(data))}[kind]
    path.write_bytes(data)
    return Altered("length", str(path.relative_to(root)), kind, lie=kind == "another")


def leaves(document: Any, trail: tuple = ()) -> Iterator[tuple]:
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield (*trail, key)
            yield from leaves(value, (*trail, key))


def hostile_values(outside: Path) -> list[Any]:
    numbers = [-1, 0, 1, 10**30, -(10**30), 2**63, 2**63 - 1, 2**53 + 1, 2**31, 1 << 24, 1e308, float("nan"), 0.5]
    paths = [
        "../victim/id_rsa",
        f"{outside}/id_rsa",
        "segments/../../victim/id_rsa",
        "segments//x",
        "leases/x",
        "..",
        "",
    ]
    paths += [f"{outside}/precious", "../../victim/precious", "segments\\..\\x", "versions/latest", "\0", "\ud800"]
    nested: Any = []
    for _ in range(150):
        nested = [nested]
    return [*numbers, *paths, "0" * 64, "x" * 100_000, nested, {}, [], None, True, [0] * 10_000, {"path": "../victim"}]


def alter_field(root: Path, outside: Path, chance: random.Random) -> Altered:
    path = files_of(root, chance, "*.json")
    told_of: list[str] = []

    def change(document: dict[str, Any]) -> None:
        for _ in range(chance.choice((1, 1, 2, 5))):
            *above, last = chance.choice(list(leaves(document)))
            place: Any = document
            for key in above:
                place = place[key]
            told_of.append("/".join(str(key) for key in (*above, last)))
            kind = chance.random()
            if kind < 0.1:
                del place[last]
            elif kind < 0.15 and isinstance(place, list):
                place += [place[last]] * chance.choice((1, 1_000))
            elif kind < 0.2 and isinstance(place, dict):
                place[str(chance.choice(hostile_values(outside)))[:50]] = place[last]
            else:
                place[last] = chance.choice(hostile_values(outside))

    with contextlib.suppress(KeyError, IndexError, TypeError):  # the second took away what the third was in
        rewritten(path, change)
    return Altered("field", str(path.relative_to(root)), ", ".join(told_of), lie=True)


def alter_link(root: Path, outside: Path, chance: random.Random) -> Altered:
    places = [path for path in sorted(root.rglob("*")) if path != root]
    place = chance.choice(places) if chance.random() < 0.5 else files_of(root, chance)
    path = str(place.relative_to(root))
    aside = root.parent / "aside"
    place.rename(aside)
    kinds = ["outside", "folder", "copy", "dangling", "device", "fifo", "folder there", "file there", "loop", "root"]
    kind = chance.choice(kinds)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder there":
        place.mkdir()
    elif kind == "file there":
        place.write_bytes(b"x")
    else:
        to = {"outside": outside / "id_rsa", "folder": outside / "done", "copy": aside, "dangling": outside / "none"}
        to |= {"device": Path("/dev/zero"), "loop": place, "root": Path("/")}
        place.symlink_to(to[kind])
    return Altered("link", path, kind)


def alter_names(root: Path, outside: Path, chance: random.Random) -> Altered:
    """Files and folders that nobody wrote."""
    lease = {
        "nonce": chance.choice(["../../victim/precious", f"{outside}/precious", "0" * 16, "", "../versions/latest"]),
        "work": chance.choice(["x", "add /begun", "\x1b]0;x\x07"]),
        "process": {
            "host": chance.choice(["elsewhere", os.uname().nodename]),
            "namespace": "n",
            "pid": chance.choice([1, -1, 10**30]),
            "started": "1",
        },
        "beat_seconds": chance.choice([5, -1, 1e300, 1e-300]),
        "holds": chance.choice([[], [""], ["../"], ["segments/00000001/"]]),
    }
    file = {"path": "../victim/id_rsa", "rows": 1, "num_bytes": 1, "sha256": "0" * 64, "first_id": 0, "last_id": 1}
    mark = {"part": 0, "attempt": "0" * 12, "node": "x", "planned": 1, "entries": file, "rejected": None}
    plan = {"nonce": "../../victim/precious", "ids": [1], "uris": ["x"], "files": {"../victim/id_rsa": None}}
    begun = {"generation": 1, "work": "../victim", "key": "Flat", "index": file, "side": {"ids": file}, "sample": file}
    names: dict[str, bytes] = {
        "leases/0.json": json.dumps(lease).encode(),
        f"leases/{'0' * 16}.json": json.dumps(lease | {"nonce": "0" * 16}).encode(),
        "leases/x\n.json": b"{}",
        "erasures/0.json": json.dumps(plan).encode(),
        f"erasures/{'0' * 16}.json": json.dumps(plan | {"nonce": "0" * 16}).encode(),
        "index/begun-0000000000000000/begun.json": json.dumps(begun).encode(),
        "index/begun-x/gathered-0.json": json.dumps(begun).encode(),
        "index/99999999999999999999-x/y": b"x",
        "segments/00000003/done/000000.json": json.dumps(mark).encode(),
        "segments/00000003/done/x.json": b"{}",
        "segments/99999999/segment.json": b"{}",
        "segments/00000050/segment.json": b"[" * 100_000,
        "segments/00000051/given_up.json": b"",
        "versions/99999999999999999999.json": b"{}",
        "versions/00000000000000009999.json": b"{}",
        "versions/00000000000000000000.json": b"{}",
        "versions/00000000000000000000.checkpoint.json": b"{}",
        "versions/latest": chance.choice([b"-1", b"9" * 5_000, b"1e9", b"\xff", b"2", b"", b"../victim/id_rsa"]),
        "copying.json": b"{}",
        "segments/..": b"",
        "labels/\udcff.parquet": b"x",
        ".x.00000000-99999999999999999999-1-000000000000.aside": b"x",
    }
    name = chance.choice(sorted(names))
    path = root / name
    if name == "segments/..":
        (root / "segments" / "mine").symlink_to(outside)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(names[name])
    return Altered("names", name.encode("utf-8", "backslashreplace").decode(), "added")


KINDS = {"bytes": alter_bytes, "length": alter_length, "field": alter_field, "link": alter_link, "names": alter_names}


def is_of_a_shard(path: str) -> bool:
    return path.startswith("index/") and "/begun" not in path


# What is done with each, in a process of its own


class Warned(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def answers(memory: VisualMemory) -> list[Any]:
    found: list[Any] = memory.search(embeddings=QUERIES, k=7, label_set="size")
    found += [(d.label, d.votes, d.neighbors) for d in memory.classify(embeddings=QUERIES, k=9)]
    return found


def verbs(scratch: Path) -> dict[str, Callable[[VisualMemory], object]]:
    return {
        "search": answers,
        "status": lambda m: m.status(),
        "thumbnails": lambda m: m.explanation_page(m.classify(embeddings=QUERIES[:1], k=9)[0]),
        "verify": lambda m: [f"{f.severity} {f.path} {f.what}" for f in m.verify().findings],
        "copy": lambda m: m.copy(scratch / "copy"),
        "export": lambda m: m.export(scratch / "export"),
        "forget": lambda m: m.forget(ids=m.live().live_ids()[:1].tolist()),
        "index": lambda m: m.index(IndexOptions(key="Flat", rebuild=True)),
        "compact": lambda m: m.compact(),
        "expire": lambda m: m.expire(1),
        "clean": lambda m: m.verify(clean=True),
        "erase": lambda m: m.forget(labels=["cat"], erase=True),
        "clean again": lambda m: m.verify(clean=True),
    }


def used(root: Path, scratch: Path) -> dict[str, tuple[str, Any]]:
    """What each verb came to: an answer and what was warned of, or an error."""
    warned = Warned()
    logging.getLogger("pipeline").addHandler(warned)
    logging.getLogger("pipeline").propagate = False
    found: dict[str, tuple[str, Any]] = {}
    for name, verb in verbs(scratch).items():
        warned.said.clear()
        try:
            came_to = verb(VisualMemory(root))
            found[name] = ("warned" if warned.said else "done", came_to if name in ("search", "verify") else None)
        except VisualMemoryError as error:
            found[name] = ("refused", str(error))
        except OSError as error:
            found[name] = ("refused", f"{type(error).__name__}: {error}")
        except BaseException as error:
            found[name] = ("unforeseen", f"{type(error).__name__}: {str(error)[:300]}")
    return found


def in_a_process(root: Path, scratch: Path) -> tuple[dict[str, tuple[str, Any]] | None, str]:
    """As `used`, in a fork; or None and how it ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of their end
            resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))  # a bomb is an error, and harms nobody
            leases.LONGEST_BEAT_SECONDS = 0.02  # nobody is waited for
            local._sync = lambda descriptor: None
            data = pickle.dumps(used(root, scratch))
            with os.fdopen(writing, "wb") as stream:
                stream.write(data)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    data, until = b"", time.monotonic() + SECONDS
    while True:
        ready, _, _ = select.select([reading], [], [], max(until - time.monotonic(), 0))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            break
        piece = os.read(reading, 1 << 20)
        if not piece:
            break
        data += piece
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        return pickle.loads(data), ""
    return None, "hangs" if status == -signal.SIGKILL else f"ended with {status}"


class Watched:
    """Folders of which nothing may be opened, read, written or removed, as the kernel tells (inotify)."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(_IN_NONBLOCK)
        self._folders: dict[int, Path] = {}
        for each in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(each), _EVENTS)
            assert watch > 0, os.strerror(ctypes.get_errno())
            self._folders[watch] = each

    def events(self) -> list[str]:
        """What happened since the last time."""
        found = []
        while True:
            try:
                data = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return found
            at = 0
            while at < len(data):
                watch, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode(errors="replace")
                found.append(f"{self._folders.get(watch)}/{name} 0x{mask & 0xFFF:x}")
                at += 16 + length


@dataclass
class Fuzz:
    """Altered memories below `folder`, one after the other."""

    folder: Path
    seed: int
    only: Sequence[str] = ()
    without_shards: bool = False
    bases: dict[str, Path] = field(default_factory=dict)
    answered: dict[str, dict[str, tuple[str, Any]]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the memories, in processes of their own so that no library has started a thread in this one."""
        self.outside = Outside.at(self.folder / "outside" / "victim")
        for name, make in BASES.items():
            root = self.folder / "bases" / name.replace(" ", "-")
            root.parent.mkdir(exist_ok=True)
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    make(root)
                    bury(LocalStorage(root))
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0, name
            self.bases[name] = root
            place, scratch = self._copied(name)
            found, ended = in_a_process(place, scratch)
            assert found is not None, (name, ended)
            unforeseen = {verb: came_to for verb, came_to in found.items() if came_to[0] == "unforeseen"}
            assert not unforeseen, (name, unforeseen)
            self.answered[name] = found
        self.watched = Watched(self.folder / "outside")

    def trial(self, number: int) -> tuple[Altered, list[str]]:
        """Alter a memory and use it; what is wrong."""
        chance = random.Random(f"{self.seed} {number}")
        base = chance.choice(sorted(self.bases))
        while True:
            root, scratch = self._copied(base)
            altered = KINDS[chance.choice(self.only or sorted(KINDS))](root, self.outside.folder, chance)
            altered.base = base
            if not (self.without_shards and is_of_a_shard(altered.path) and altered.kind in ("bytes", "length")):
                break
        self.watched.events()
        found, ended = in_a_process(root, scratch)
        wrong = [f"outside: {event}" for event in self.watched.events()]
        if self.outside.look() != self.outside.before:
            wrong.append("outside: it is changed")
        self.watched.events()
        wrong += self._leaked(root.parent)
        if found is None:
            return altered, [*wrong, ended]
        wrong += [f"{verb}: {came_to[1]}" for verb, came_to in found.items() if came_to[0] == "unforeseen"]
        how, answer = found["search"]
        if how == "done" and not altered.lie and answer != self.answered[base]["search"][1]:
            wrong.append("another answer without a warning")
        return altered, wrong

    def _copied(self, base: str) -> tuple[Path, Path]:
        place = self.folder / "trial"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "scratch").mkdir()
        (place / "victim").symlink_to(self.folder / "outside" / "victim")  # where relative paths lead to
        shutil.copytree(self.bases[base], place / "memory")
        return place / "memory", place / "scratch"

    def _leaked(self, place: Path) -> Iterator[str]:
        """Files with bytes of what is outside."""
        for above, _, names in os.walk(place):
            for name in names:
                path = os.path.join(above, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    with open(path, "rb") as stream:
                        if b"CANARY" in stream.read():
                            yield f"outside: its bytes are in {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], choices=sorted(KINDS))
    parser.add_argument("--without-shards", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="altered-"))
    until, failed, done = time.monotonic() + asked.seconds, 0, 0
    try:
        fuzz = Fuzz(folder, asked.seed, asked.only, asked.without_shards)
        fuzz.prepare()
        for number in range(asked.first, asked.first + asked.count):
            if time.monotonic() > until:
                break
            altered, wrong = fuzz.trial(number)
            done += 1
            if wrong:
                failed += 1
                sys.stdout.write(json.dumps({"number": number, **vars(altered), "wrong": wrong}) + "\n")
                sys.stdout.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(json.dumps({"altered": done, "failed": failed}) + "\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
