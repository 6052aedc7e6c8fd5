"""Deciding about a whole source: the decisions of `classify`, in Parquet, continued where it was."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.embeddings import parts
from pipeline.embeddings.parts import PartEmbedder
from pipeline.errors import SourceError, UnknownName, UsageError
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.edits.test_sources import picture, write_mixed


@pytest.fixture
def memory(tmp_path: Path, weights: str) -> VisualMemory:
    memory = VisualMemory(tmp_path / "memory")
    folder = tmp_path / "known"
    for row in range(40):
        (folder / f"class {row % 4}").mkdir(parents=True, exist_ok=True)
        (folder / f"class {row % 4}" / f"{row}.png").write_bytes(picture(row))
    memory.add(folder, encoder=ENCODER, weights=weights, weights_order="positional", image_size=IMAGE_SIZE)
    return memory


def decisions_in(out: Path) -> list[dict]:
    return ds.dataset(out / "decisions", format="parquet").to_table().sort_by("id").to_pylist()


def test_the_decisions_are_those_of_classify(memory: VisualMemory, tmp_path: Path) -> None:
    source = write_mixed(tmp_path / "mixed")
    report = memory.classify_source(source, tmp_path / "out", k=7, voting="softmax", abstain_below=0.4)
    assert (report.planned, report.decided, len(report.rejects), report.resumed) == (20, 17, 3, 0)
    rows = decisions_in(tmp_path / "out")
    loose = [row for row in rows if "#" not in row["uri"]]
    assert len(rows) == 17
    assert len(loose) == 5
    paths = [row["uri"].replace("%25", "%").replace("%23", "#") for row in loose]
    expected = memory.classify(paths, k=7, voting="softmax", abstain_below=0.4)
    for row, decision in zip(loose, expected, strict=True):
        found = decision.to_json()
        assert {name: row[name] for name in ("label", "abstained", "reason", "version")} == {
            name: found[name] for name in ("label", "abstained", "reason", "version")
        }
        assert [n["id"] for n in row["neighbors"]] == [n.id for n in decision.neighbors]
        assert row["confidence"] == pytest.approx(decision.confidence, abs=1e-5)
        assert dict(row["votes"]) == pytest.approx(decision.votes, abs=1e-5)
    assert {row["source_label"] for row in rows} == {"loose", "cat", "dog"}
    again = memory.classify_source(source, tmp_path / "out", k=7, voting="softmax", abstain_below=0.4)
    assert (again.planned, again.decided, again.resumed) == (20, 17, 20)


def test_killed_and_repeated_by_the_version_it_began_with(
    memory: VisualMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "asked"
    source.mkdir()
    for row in range(300):
        (source / f"{row:03d}.png").write_bytes(picture(row % 60))
    undisturbed = memory.classify_source(source, tmp_path / "undisturbed", k=5)
    embed = PartEmbedder.embed

    def fails_in_the_third(self: PartEmbedder, part: int, *rest: object) -> parts.EmbeddedPart:
        if part == 2:
            raise KeyboardInterrupt
        return embed(self, part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PartEmbedder, "embed", fails_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        memory.classify_source(source, tmp_path / "out", k=5)
    monkeypatch.undo()
    (tmp_path / "out/decisions/000002-of-a-dead-worker.parquet").write_bytes(b"half")
    memory.forget(labels=["class 0"])
    report = memory.classify_source(source, tmp_path / "out", k=5)
    assert (report.resumed, report.planned, report.version) == (256, 300, undisturbed.version)
    assert decisions_in(tmp_path / "out") == decisions_in(tmp_path / "undisturbed")
    after = memory.classify_source(source, tmp_path / "after", k=5)
    assert after.version > undisturbed.version
    assert not any(row["label"] == "class 0" for row in decisions_in(tmp_path / "after"))


@pytest.mark.slow
def test_on_ray_and_into_a_bucket(memory: VisualMemory, tmp_path: Path, s3, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.ray_cluster.on_ray import start_ray

    for name, value in s3.admin.items():
        monkeypatch.setenv(name, value)
    source = write_mixed(tmp_path / "mixed")
    here = memory.classify_source(source, tmp_path / "out", k=3, balance="auto")
    there = memory.classify_source(source, s3.uri(), k=3, balance="auto")
    assert (there.planned, there.decided) == (here.planned, here.decided)
    start_ray()
    on_ray = memory.classify_source(source, tmp_path / "ray", k=3, balance="auto", runner="ray")
    assert on_ray.decided == here.decided
    columns = ["id", "uri", "label"]
    tables = [ds.dataset(tmp_path / out / "decisions").to_table(columns).sort_by("id") for out in ("out", "ray")]
    assert tables[0] == tables[1]


def test_mistakes_change_nothing(memory: VisualMemory, tmp_path: Path) -> None:
    source = write_mixed(tmp_path / "mixed")
    memory.classify_source(source, tmp_path / "out", k=3)
    with pytest.raises(UsageError, match="holds decisions about .* made with other options"):
        memory.classify_source(source, tmp_path / "out", k=4)
    with pytest.raises(UsageError, match="has other files in it"):
        memory.classify_source(source, tmp_path / "mixed", k=4)
    with pytest.raises(UnknownName, match="no label set"):
        memory.classify_source(source, tmp_path / "no", label_set="coarse")
    with pytest.raises(UnknownName, match="exclude names id 5"):
        memory.classify_source(source, tmp_path / "no", exclude=[5])
    with pytest.raises(SourceError, match="there is no source"):
        memory.classify_source(tmp_path / "nowhere", tmp_path / "no")
    with pytest.raises(SourceError, match="`max_rejected`"):
        memory.classify_source(source, tmp_path / "strict", max_rejected=0)
    assert not (tmp_path / "no").exists()


def test_any_tool_reads_the_columns(memory: VisualMemory, tmp_path: Path) -> None:
    report = memory.classify_source(write_mixed(tmp_path / "mixed"), tmp_path / "out")
    [first, *_] = sorted((tmp_path / "out/decisions").iterdir())
    schema = pq.read_schema(first)
    assert schema.field("confidence").type == pa.float64()
    assert schema.field("neighbors").type.value_type.field("similarity").type == pa.float32()
    confidences = np.array([row["confidence"] for row in decisions_in(tmp_path / "out")])
    assert len(confidences) == report.decided
    assert ((confidences > 0) & (confidences <= 1)).all()
