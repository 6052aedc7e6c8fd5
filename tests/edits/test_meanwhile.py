"""A writer whose files go while it works is told of a conflict, and of damage only where something is missing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.errors import CommitConflict, DamagedFile
from pipeline.index.build.plan import IndexOptions
from pipeline.store.storage.local import LocalStorage
from tests.conftest import MakeMemory, add_vectors, unit

Verb = Callable[[VisualMemory], object]

VERBS: dict[str, Verb] = {
    "forget": lambda m: m.forget(labels=["cat"]),
    "relabel": lambda m: m.relabel(ids=[4 << 39], label="fox"),
    "compact": lambda m: m.compact(),
    "index": lambda m: m.index(IndexOptions(key="Flat")),
    "copy": lambda m: m.copy(Path(m.uri).with_name("copy")),
    "erase": lambda m: m.forget(labels=["dog"], erase=True),
}


class Overtaken(LocalStorage):
    """Another process does something just before the first file of entries is read, each time it is looked for."""

    def __init__(self, root: Path, others: Callable[[], object]) -> None:
        super().__init__(root)
        self.others = others
        self.times = 2  # what is read again after the first time is overtaken too

    def local_path(self, path: str) -> Path:
        if "/entries/" in path and self.times:
            self.times -= 1
            self.others()
        return super().local_path(path)


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    made = make_memory(unit(np.random.default_rng(0).normal(size=(200, 8))), ["cat", "dog"] * 100)
    for number in range(3):
        vectors = unit(np.random.default_rng(number).normal(size=(20, 8)))
        add_vectors(made.log, vectors, ["eel"] * 20, name=f"b{number}")
    return made


@pytest.mark.parametrize("name", VERBS)
def test_what_others_erased_is_not_missing(memory: VisualMemory, name: str) -> None:
    ids = iter(memory.live().live_ids()[:10].tolist())

    def erase() -> None:
        VisualMemory(memory.uri).forget(ids=[next(ids)], erase=True)

    overtaken = VisualMemory(memory.uri)
    overtaken.log.storage = Overtaken(Path(memory.uri), erase)
    try:
        VERBS[name](overtaken)
    except CommitConflict as error:
        assert "run the command again" in str(error)
        VERBS[name](VisualMemory(memory.uri))
    assert overtaken.log.storage.times < 2
    assert VisualMemory(memory.uri).verify(clean=True).sound


@pytest.mark.parametrize("name", VERBS)
def test_what_is_missing_is_damage(memory: VisualMemory, name: str) -> None:
    for path in Path(memory.uri).glob("segments/*/entries/*"):
        path.unlink()
    with pytest.raises(DamagedFile, match="is missing from the memory at .*: restore it from a copy"):
        VERBS[name](VisualMemory(memory.uri))
