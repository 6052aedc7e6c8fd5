"""A reader that follows edits reads one overlay file for each, also when files of overlays are merged."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.index.search import overlay
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from tests.conftest import MakeMemory, unit


def told(memory: VisualMemory) -> dict[int, tuple[str | None, str | None]]:
    """The labels of all live entries, as stored and in the label set `view`, by id."""
    live = memory.live()
    ids_N = live.live_ids()
    in_set = live.in_label_set(memory.log.storage, memory.state(), "view")
    columns = [[of.labels[c] if c >= 0 else None for c in of.codes_of(ids_N)] for of in (live, in_set)]
    return dict(zip(ids_N.tolist(), zip(*columns, strict=True), strict=True))


def test_each_edit_costs_one_file(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    memory = make_memory(unit(random.normal(size=(300, 8))), ["cat", "dog", "eel"] * 100)
    ids = memory.live().live_ids().tolist()
    memory.relabel(ids=ids[:1], label="own", label_set="view")
    assert len(told(memory)) == 300
    read: list[int] = []

    def watch(name: str) -> None:
        original = getattr(overlay, name)

        def counted(storage: Storage, files: Sequence[FileRef]) -> Any:
            read.append(len(files))
            return original(storage, files)

        monkeypatch.setattr(overlay, name, counted)

    def compared(*_: object) -> None:
        raise AssertionError("all labels were compared")

    watch("read_tombstones")
    watch("read_label_rows")
    with monkeypatch.context() as context:
        context.setattr(overlay, "_different", compared)
        for turn in range(40):
            memory.forget(ids=[ids[turn]])
            told(memory)
            some = [int(i) for i in random.choice(ids[40:], 1 + turn % 3, replace=False)]
            memory.relabel(ids=some, label=f"new {turn}", label_set="view" if turn % 4 == 0 else None)
            told(memory)
    assert set(read) == {1}
    assert len(memory.state().tombstones) < 8, "files are merged"
    assert told(memory) == told(VisualMemory(memory.uri))
    for version in memory.log.retained()[-30::7]:
        memory.rollback(version)
        assert told(memory) == told(VisualMemory(memory.uri)) == told(VisualMemory(memory.uri, at=version))
