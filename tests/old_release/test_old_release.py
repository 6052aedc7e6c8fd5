"""A memory that an earlier release wrote (make.py, by 0.1.0 of 2026-11-27) opens, answers, is edited and is erased."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from tests.old_release.make import answers, vectors

HERE = Path(__file__).parent
FIRST_ID = 1 << 39
MOST_BYTES = 300_000


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    return VisualMemory(shutil.copytree(HERE / "memory", tmp_path / "memory"))


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix != ".pyc" and path.is_file()) < MOST_BYTES


def test_it_answers_to_the_last_digit(memory: VisualMemory) -> None:
    assert memory.verify().findings == ()
    assert answers(memory) == json.loads((HERE / "answers.json").read_text())


def test_its_past_can_be_read_and_come_back(memory: VisualMemory) -> None:
    assert VisualMemory(memory.uri, at=2).status()["entries"] == 300
    assert len(memory.history()) == 7
    memory.rollback(3)
    assert memory.status()["entries"] == 360
    memory.rollback(7)
    assert answers_without_versions(memory) == answers_without_versions(VisualMemory(memory.uri, at=7))


def test_edits_leave_the_other_answers(memory: VisualMemory, tmp_path: Path) -> None:
    before = answers_without_versions(memory)
    memory.compact()
    assert answers_without_versions(memory) == before
    np.save(tmp_path / "more.npy", vectors(20, 7))
    memory.add(tmp_path / "more.npy", label="new")
    memory.forget(labels=["new"])
    assert answers_without_versions(memory) == before
    memory.index(IndexOptions(key="Flat", rebuild=True))
    memory.copy(tmp_path / "copy")
    assert VisualMemory(tmp_path / "copy").verify().findings == ()
    assert memory.verify().findings == ()


def test_it_is_erased_and_the_proof_holds(memory: VisualMemory) -> None:
    report = memory.forget(ids=[FIRST_ID + row for row in (4, 5)], erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    assert memory.verify().findings == ()
    assert memory.status()["entries"] == 355


def answers_without_versions(memory: VisualMemory) -> dict:
    """The answers, but for what changes with every version and build."""
    said = answers(memory)
    for decisions in said.values():
        for decision in decisions:
            if isinstance(decision, dict):
                for name in ("version", "shards_searched", "shards_total"):
                    decision.pop(name, None)
    return said
