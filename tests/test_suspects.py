"""Suspects: entries with mistaken labels are found, and a person's answer goes back into the memory."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import SourceError, UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.questions.suspects import write_corrections
from tests.conftest import MakeMemory, unit


def classes(random: np.random.Generator, num_classes: int, each: int, spread: float = 0.4) -> tuple[np.ndarray, list]:
    """Vectors around a centre for each class, float16 [N, 16], and labels."""
    centres = random.normal(size=(num_classes, 16))
    vectors = np.repeat(centres, each, axis=0) + spread * random.normal(size=(num_classes * each, 16))
    return unit(vectors), [f"class {row // each}" for row in range(num_classes * each)]


def test_mistaken_labels_are_found_and_corrected(make_memory: MakeMemory, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors_ND, labels = classes(random, 5, 60, spread=0.3)
    mistaken = sorted(random.choice(len(labels), 15, replace=False).tolist())
    told = list(labels)
    for row in mistaken:
        told[row] = f"class {(int(labels[row][-1]) + 1) % 5}"
    memory = make_memory(vectors_ND, told)
    report = memory.suspects(15)
    assert {int(s.uri.split("/")[-1].split(".")[0]) for s in report.suspects} == {*mistaken}
    assert all(s.kind == "mislabelled" and s.share < s.suggested_share for s in report.suspects)
    assert all(s.suggested == labels[int(s.uri.split("/")[-1].split(".")[0])] for s in report.suspects)
    assert report.counts["mislabelled"] == 15
    assert report.labelled == 300
    assert all(len(s.neighbors) == 10 and s.id not in {n.id for n in s.neighbors} for s in report.suspects)
    write_corrections(report.suspects, tmp_path / "suspects.csv")
    with pytest.raises(UsageError, match="is there already"):
        write_corrections(report.suspects, tmp_path / "suspects.csv")
    assert memory.relabel(file=tmp_path / "suspects.csv").relabelled == 15
    assert memory.suspects(15).counts["mislabelled"] == 0
    assert memory.evaluate_leave_one_out(ks=(10,), votings=("rank",)).accuracy["rank"][10] == 100.0


def test_copies_and_divided_votes_are_kinds_of_their_own(make_memory: MakeMemory) -> None:
    random = np.random.default_rng(1)
    vectors_ND, labels = classes(random, 3, 40)
    between = vectors_ND[:1].astype(np.float32) + vectors_ND[40:41].astype(np.float32)
    near = vectors_ND[5:6].astype(np.float32) + 0.01 * random.normal(size=(1, 16))
    memory = make_memory(
        np.concatenate([vectors_ND, vectors_ND[3:4], unit(near), unit(between)]),
        [*labels, "class 2", "class 0", "class 0"],
    )
    report = memory.suspects(20)
    by_row = {int(s.uri.split("/")[-1].split(".")[0]): s for s in report.suspects}
    ids = memory.live().live_ids()
    assert by_row[120].kind == "mislabelled", "a copy of row 3 with another label"
    assert by_row[120].duplicate_of == ids[3]
    assert by_row[3].kind == "duplicated"
    assert by_row[3].duplicate_of == ids[120]
    assert {by_row[row].kind for row in (5, 121)} == {"duplicated"}
    assert by_row[121].duplicate_of == ids[5]
    copies = memory.suspects(20, kind="duplicated").suspects
    assert [s.kind for s in copies] == ["duplicated"] * len(copies)
    assert int(copies[0].id) == ids[3], "the label of its copy differs, so it comes first"
    assert report.to_json()["duplicated"] == len(copies) == report.counts["duplicated"]


def test_the_same_in_shards_and_in_parts(make_memory: MakeMemory) -> None:
    random = np.random.default_rng(2)
    vectors_ND, labels = classes(random, 4, 150, spread=0.9)
    memory = make_memory(vectors_ND, labels)
    fresh = memory.suspects(50)
    memory.index(IndexOptions(key="Flat"))
    assert memory.suspects(50).suspects == fresh.suspects
    assert memory.suspects(5).suspects == fresh.suspects[:5]
    assert {"id", "kind", "suggested"} <= set(fresh.to_arrow().column_names)


def test_what_cannot_be_asked(make_memory: MakeMemory) -> None:
    vectors_ND, labels = classes(np.random.default_rng(3), 2, 3)
    memory = make_memory(vectors_ND, labels)
    with pytest.raises(UsageError, match="1 or more"):
        memory.suspects(0)
    with pytest.raises(UsageError, match="number of neighbours"):
        memory.suspects(k=0)
    with pytest.raises(UsageError, match="unknown"):
        memory.suspects(kind="odd")  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="no entry with a label"):
        make_memory(vectors_ND, [None] * 6, "unlabelled").suspects()
    alone = make_memory(vectors_ND[:1], ["only"], "alone").suspects()
    assert (alone.suspects, alone.labelled) == ((), 1)
