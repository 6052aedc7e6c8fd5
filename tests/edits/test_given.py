"""Vectors added, asked with and exported in place of images: identities, resuming, refusals, and the way back."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_reader import EmbeddingReader

from pipeline import VisualMemory
from pipeline.edits.export import export
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.parts import PartEmbedder
from pipeline.errors import DamagedFile, EncoderError, IdentityMismatch, MemoryMissing, SourceError, UsageError
from pipeline.images.containers import container
from pipeline.images.reading import files
from pipeline.store.log.state import State
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.identity import Identity, Preprocessing
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.edits.test_sources import entries_of, picture, write_tar
from tests.store.seaweed import SeaweedFS

LABELS = ["cat", "dog", "eel"]


def clustered(num_rows: int, dimension: int = 16, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Vectors float32 [N, D] around one centre a label, of any length, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(3, dimension))
    classes = rng.integers(3, size=num_rows)
    vectors = (centres[classes] + rng.normal(size=(num_rows, dimension))) * rng.uniform(0.5, 9, (num_rows, 1))
    return vectors.astype(np.float32), [LABELS[one] for one in classes]


def write_clip(folder: Path, files_rows: list[int], dimension: int = 16, **extra: list) -> Path:
    """Files as clip-retrieval writes them, with embeddings of texts beside."""
    for kind in ("img_emb", "text_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    first = 0
    for number, rows in enumerate(files_rows):
        vectors, labels = clustered(rows, dimension, seed=number)
        np.save(folder / f"img_emb/img_emb_{number}.npy", vectors.astype(np.float16))
        np.save(folder / f"text_emb/text_emb_{number}.npy", vectors)
        paths = [f"/data/{first + row:05d} #{row}.jpg" for row in range(rows)]
        columns = {"image_path": paths, "caption": ["a b"] * rows, "label": labels, "width": [640] * rows, **extra}
        pq.write_table(pa.table(columns), folder / f"metadata/metadata_{number}.parquet")
        first += rows
    return folder


def rows_of(memory: VisualMemory) -> dict[str, tuple]:
    """Label, dataset and vector of every live entry by uri."""
    live = memory.live()
    kept = {uri: entry for uri, entry in entries_of(memory).items() if live.unknown([entry[0]]) is None}
    return {uri: (*entry[1:], live.vectors_of(np.array([entry[0]]))[0].tobytes()) for uri, entry in kept.items()}


def decisions_of(memory: VisualMemory, num_queries: int = 40, dimension: int = 16) -> list[tuple]:
    asked, _ = clustered(num_queries, dimension, seed=99)
    return [
        (decision.label, decision.confidence, [(n.uri, n.label, n.similarity, n.weight) for n in decision.neighbors])
        for decision in memory.classify(embeddings=asked, k=7)
    ]


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    """A memory of 130 vectors given without an encoder, in three parts."""
    memory = VisualMemory(tmp_path / "memory")
    memory.add(write_clip(tmp_path / "clip", [90, 40]))
    return memory


def test_a_memory_of_given_vectors_does_all_that_needs_no_image(memory: VisualMemory, tmp_path: Path) -> None:
    status = memory.status()
    assert (status["entries"], status["planned"], status["rejected"]) == (130, 130, 0)
    assert (status["encoder"], status["dimension"], status["datasets"]) == ("given", 16, {"clip": 130})
    entries = entries_of(memory)
    assert entries["/data/00003 %233.jpg"][1] == clustered(90)[1][3]
    assert not list((tmp_path / "memory").glob("encoder/*"))
    assert memory.evaluate_leave_one_out(ks=[5]).num_queries == 130
    assert memory.verify().findings == ()
    again = memory.add(tmp_path / "clip")
    assert (again.segment, again.already) == (None, 1)
    report = memory.forget(uris=["/data/00003 %233.jpg"], erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    before = decisions_of(memory)
    memory.index()
    memory.copy(tmp_path / "copied")
    memory.compact()
    assert decisions_of(memory) == before == decisions_of(VisualMemory(tmp_path / "copied"))
    assert memory.verify().findings == ()
    memory.rollback(2)
    assert memory.status()["entries"] == 129


def test_every_kind_of_file_in_one_prefix(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mixed"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat/1.png").write_bytes(picture(1))
    write_tar(folder / "a.tar", {"dog/x.png": picture(2)})
    pq.write_table(pa.table({"image": [picture(3)], "label": ["eel"]}), folder / "b.parquet")
    write_clip(folder / "clip", [5], 1280)
    vectors, labels = clustered(4, 1280)
    np.save(folder / "alone.npy", vectors.astype(np.float64))
    np.save(folder / "pair.npy", vectors)
    pq.write_table(
        pa.table({"url": [f"https://x/{row}.jpg" for row in range(4)], "class": labels}), folder / "pair.parquet"
    )
    column = pa.array(list(vectors.astype(np.float32)), pa.list_(pa.float32()))
    pq.write_table(pa.table({"clip_embedding": column, "key": ["k0", None, "k2", ""]}), folder / "column.parquet")
    memory = VisualMemory(tmp_path / "memory")
    options = {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}
    report = memory.add(folder, thumbnails=True, **options)
    assert (report.planned, report.entries, report.rejected) == (20, 20, 0)
    below = {uri.removeprefix(f"{folder}/"): entry[1] for uri, entry in entries_of(memory).items()}
    assert (below["cat/1.png"], below["a.tar#dog/x.png"], below["b.parquet#row=0"]) == ("cat", "dog", "eel")
    assert (below["alone.npy#row=3"], below["https://x/2.jpg"], below["column.parquet#row=3"]) == (
        None,
        labels[2],
        None,
    )
    assert {"k0", "k2", "column.parquet#row=1", "/data/00004 %234.jpg"} <= set(below)
    assert memory.verify().findings == ()
    stored = memory.live().vectors_of(np.array([entries_of(memory)[f"{folder}/alone.npy#row=3"][0]]))
    assert np.allclose(stored[0], vectors[3] / np.linalg.norm(vectors[3]), atol=1e-3)
    [[nearest]] = memory.search([picture(2)], k=1)
    assert nearest.uri == f"{folder}/a.tar#dog/x.png"
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors/more.npy", vectors)
    monkeypatch.setattr(Encoder, "open", lambda *_: pytest.fail("the model was loaded, and no image is there"))
    with pytest.raises(UsageError, match=f"do not say by which encoder.*`encoder` {ENCODER}"):
        VisualMemory(memory.uri).add(tmp_path / "vectors")
    fresh = VisualMemory(memory.uri)
    assert fresh.add(tmp_path / "vectors", encoder=ENCODER).entries == 4
    assert fresh.evaluate(folder / "pair.npy", ks=[1]).accuracy["plurality"][1] == 100.0


@pytest.mark.usefixtures("a_part_each")
def test_killed_and_run_again_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "SLICE_VECTORS", 32)
    source = write_clip(tmp_path / "clip", [90, 40])
    vectors, _ = clustered(50)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 16)
    pq.write_table(pa.table({"embedding": column}), source / "z.parquet", row_group_size=20)
    whole = VisualMemory(tmp_path / "whole")
    whole.add(source)
    embed = PartEmbedder.embed

    def killed(self: PartEmbedder, part: int, *rest: object) -> object:
        if part == 4:
            raise KeyboardInterrupt
        return embed(self, part, *rest)  # type: ignore[arg-type]

    memory = VisualMemory(tmp_path / "memory")
    monkeypatch.setattr(PartEmbedder, "embed", killed)
    with pytest.raises(KeyboardInterrupt):
        memory.add(source)
    monkeypatch.undo()
    [add] = memory.status()["under_way"]
    assert (add["planned"], add["done"], add["parts_done"]) == (180, 122, 4)
    stages: list[str] = []
    report = memory.add(source, on_progress=lambda moment: stages.append(moment.stage))
    assert [*dict.fromkeys(stages)][-3:] == ["reading vectors", "noting uris and hashes", "looking for duplicates"]
    assert (report.resumed, report.entries, report.rejected) == (122, 180, 0)
    assert rows_of(memory) == rows_of(whole)
    assert entries_of(memory) == entries_of(whole)


def test_in_a_bucket_it_is_the_same(
    s3: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: VisualMemory
) -> None:
    for name, value in s3.admin.items():
        monkeypatch.setenv(name, value)
    files._file_system.cache_clear()
    there, source, place = fsspec.filesystem("s3", skip_instance_cache=True), s3.uri(), s3.uri()
    for path in (tmp_path / "clip").rglob("*.*"):
        there.put_file(str(path), f"{source.removeprefix('s3://')}/{path.relative_to(tmp_path / 'clip')}")
    remote = VisualMemory(tmp_path / "remote")
    assert remote.add(f"{source}/img_emb", dataset="clip").entries == 130
    assert rows_of(remote) == rows_of(memory)
    exported = memory.export(f"{place}/out", rows_per_file=50)
    assert (exported.files, exported.entries) == (3, 130)
    back = VisualMemory(tmp_path / "back")
    back.add(f"{place}/out", dataset="clip")
    assert rows_of(back) == rows_of(memory)


# What is wrong is said


def test_bad_rows_are_rejected_one_by_one(tmp_path: Path) -> None:
    vectors, _ = clustered(20)
    vectors[3], vectors[7, 2], vectors[9, 0] = 0, np.nan, np.inf
    (tmp_path / "s").mkdir()
    np.save(tmp_path / "s/a.npy", vectors)
    ragged = [[1.0] * 16, None, [1.0] * 15, [], [1.0] * 15 + [None], [2.0] * 16]
    pq.write_table(pa.table({"vector": pa.array(ragged, pa.list_(pa.float16()))}), tmp_path / "s/b.parquet")
    report = VisualMemory(tmp_path / "memory").add(tmp_path / "s", labels="none", max_rejected=0.5)
    assert (report.planned, report.entries, report.rejected) == (26, 19, 7)
    reasons = {reject.uri.rpartition("/")[2]: reject.reason for reject in report.rejects}
    assert reasons["a.npy#row=3"] == "the vector is all zeros, or too short to have a direction"
    assert reasons["a.npy#row=7"] == reasons["a.npy#row=9"] == reasons["b.parquet#row=4"] == "the vector is not finite"
    assert reasons["b.parquet#row=1"] == "there is no vector in the row"
    assert reasons["b.parquet#row=2"] == "the vector has 15 dimensions where 16 are expected"
    assert {reject.stage for reject in report.rejects} == {"read"}


def unequal(folder: Path) -> None:
    write_clip(folder, [5, 6])
    shutil.copy(folder / "metadata/metadata_0.parquet", folder / "metadata/metadata_1.parquet")


def without_metadata(folder: Path) -> None:
    write_clip(folder, [5, 6])
    (folder / "metadata/metadata_1.parquet").unlink()


def two_columns(folder: Path) -> None:
    column = pa.array([[1.0, 2.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": column, "vector": column}), folder / "t.parquet")


def two_dimensions(folder: Path) -> None:
    np.save(folder / "a.npy", np.ones((2, 3), np.float32))
    np.save(folder / "b.npy", np.ones((2, 4), np.float32))


def cut_short(folder: Path) -> None:
    np.save(folder / "a.npy", np.ones((20, 3), np.float32))
    with (folder / "a.npy").open("r+b") as stream:
        stream.truncate(200)


def no_vector(folder: Path) -> None:
    pq.write_table(pa.table({"embedding": pa.array([None], pa.list_(pa.float32()))}), folder / "t.parquet")


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (unequal, "img_emb_1.npy has 6 rows and .*metadata_1.parquet has 5"),
        (without_metadata, "img_emb_1.npy has no metadata at .*metadata_1.parquet"),
        (two_columns, r"several columns of embeddings, embedding .*, vector"),
        (two_dimensions, "a.npy of 3 dimensions and .*b.npy of 4 dimensions"),
        (cut_short, "a.npy is cut short: it has 200 bytes where 20 x 3 float32 need"),
        (no_vector, "no file in .* has a vector in it"),
        (lambda folder: np.save(folder / "a.npy", np.array([[{}]])), "a.npy holds Python objects"),
        (lambda folder: np.save(folder / "a.npy", np.ones(3, np.float32)), "a.npy holds float32 of shape"),
        (lambda folder: np.save(folder / "a.npy", np.ones((3, 3), int)), "a.npy holds int64 of shape"),
        (lambda folder: np.save(folder / "a.npy", np.ones((3, 3), order="F")), "a.npy is stored column by column"),
        (lambda folder: (folder / "a.npy").write_bytes(b"\x93NUMPYbroken"), "a.npy is no .npy file"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_before_anything_is_written(
    write: object, sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    write(folder)  # type: ignore[operator]
    with pytest.raises(SourceError, match=sentence):
        VisualMemory(tmp_path / "memory").add(folder)
    assert not (tmp_path / "memory").exists()


def test_what_changed_since_it_was_planned_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "SLICE_VECTORS", 10)
    source = write_clip(tmp_path / "clip", [30])
    for name in ("a", "b", "c"):
        np.save(source / f"{name}.npy", clustered(10)[0])
    column = pa.array(list(clustered(30)[0]), pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": column}), source / "t.parquet", row_group_size=10)
    memory = VisualMemory(tmp_path / "memory")
    from pipeline.edits.add import AddOptions

    plan = memory.plan_add(source, AddOptions(max_rejected=1))
    np.save(source / "a.npy", clustered(10, 8)[0])
    (source / "b.npy").unlink()
    pq.write_table(pa.table({"image_path": ["x"] * 3}), source / "metadata/metadata_0.parquet")
    with (source / "t.parquet").open("r+b") as stream:
        stream.truncate(1_000)
    report = memory.carry_out(plan)
    assert (report.planned, report.entries, report.rejected) == (90, 10, 80)
    reasons = {reject.uri.rpartition("/")[2]: reject.reason for reject in report.rejects}
    assert "a.npy has changed since it was listed" in reasons["a.npy"]
    assert reasons["b.npy"] == "there is no such file"
    assert "metadata_0.parquet has changed" in reasons["img_emb_0.npy"]
    assert "not a Parquet file" in reasons["t.parquet"]


def test_a_stray_file_is_one_rejected_row_beside_others(
    tmp_path: Path, memory: VisualMemory, digits_memory: VisualMemory
) -> None:
    """Nor does it take an encoder."""
    np.save(tmp_path / "clip/boxes.npy", np.ones((4, 4), np.int64))
    (tmp_path / "clip/broken.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "clip/text.parquet")
    report = memory.add(tmp_path / "clip", dataset="again")
    assert (report.entries, report.rejected) == (130, 3)
    boxes, broken, text = (reject.reason for reject in report.rejects)
    assert "holds int64 of shape (4, 4) and no embeddings" in boxes
    assert "not a Parquet file" in broken
    assert "no column of image bytes and none of embeddings" in text
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").write_bytes(picture(1))
    np.save(tmp_path / "photos/boxes.npy", np.ones((4, 4), np.int64))
    images = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "images"))
    report = images.add(tmp_path / "photos")
    assert (report.entries, report.rejected) == (1, 1)


# Identities


def test_the_names_of_given_vectors_keep_them_apart(memory: VisualMemory, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    np.save(tmp_path / "s/a.npy", clustered(10)[0])
    named = VisualMemory(tmp_path / "named")
    assert named.add(tmp_path / "s", encoder="given:clip").entries == 10
    assert named.status()["encoder"] == "given:clip"
    assert named.status()["identity"]["preprocessing"] is None
    with pytest.raises(IdentityMismatch, match=r"one of given:clip .*, not of given:dino"):
        named.add(tmp_path / "s", encoder="given:dino", dataset="other")
    with pytest.raises(IdentityMismatch, match=f"not of {ENCODER}"):
        named.add(tmp_path / "s", encoder=ENCODER, dataset="other")
    assert named.add(tmp_path / "s", encoder="given:clip", dataset="other").entries == 10
    assert named.add(tmp_path / "s", dataset="third").entries == 10
    memory.export(tmp_path / "out")
    with pytest.raises(IdentityMismatch, match=r"are by given \(fingerprint .*not by given:clip \(vectors without"):
        named.add(tmp_path / "out")
    with pytest.raises(UsageError, match="neither `weights` nor `image_size`"):
        VisualMemory(tmp_path / "new").add(tmp_path / "s", encoder="given", image_size=224)
    np.save(tmp_path / "s/a.npy", clustered(10, 8)[0])
    with pytest.raises(SourceError, match=r"a.npy have 8 dimensions and cannot be compared with those of given"):
        memory.add(tmp_path / "s")
    assert not (tmp_path / "new").exists()


def test_images_and_a_memory_of_given_vectors(memory: VisualMemory, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").write_bytes(picture(1))
    for ask in (
        lambda: memory.add(tmp_path / "photos"),
        lambda: memory.add_images([picture(1)]),
        lambda: memory.classify([picture(1)]),
        lambda: memory.classify_source(tmp_path / "photos", tmp_path / "decided"),
    ):
        with pytest.raises(EncoderError, match=r"no image can be embedded .*ask with a source of vectors.*--encoder"):
            ask()
    with pytest.raises(UsageError, match=r"`encoder` given:x stands for vectors .*photos holds images too"):
        VisualMemory(tmp_path / "new").add(tmp_path / "photos", encoder="given:x")
    assert memory.verify().findings == ()


def test_a_named_encoder_lets_images_ask(
    digits_memory: VisualMemory, tmp_path: Path, weights: str, digits: Path
) -> None:
    digits_memory.export(tmp_path / "out", "parquet")
    options = {"encoder": ENCODER, "weights": weights, "weights_order": "positional"}
    memory = VisualMemory(tmp_path / "memory")
    assert memory.add(tmp_path / "out", image_size=IMAGE_SIZE, **options).entries == 100
    asked = sorted((digits / "ask").rglob("*.png"))[::9]

    def found(memory: VisualMemory) -> list:
        return [(d.label, d.votes, [(n.uri, n.similarity) for n in d.neighbors]) for d in memory.classify(asked, k=9)]

    assert found(memory) == found(digits_memory)
    np.save(tmp_path / "a.npy", clustered(3, 8)[0])
    with pytest.raises(SourceError, match="8 dimensions"):
        VisualMemory(tmp_path / "new").add(tmp_path / "a.npy", image_size=IMAGE_SIZE, **options)
    given = VisualMemory(tmp_path / "given")
    given.add(tmp_path / "out")
    assert given.status()["encoder"].startswith(f"given:{ENCODER}@")
    given.add(tmp_path / "out", dataset="again")  # the same maker needs no word
    own = Path(shutil.copytree(digits_memory.uri, tmp_path / "own"))
    assert VisualMemory(own).add(tmp_path / "out", dataset="again").entries == 100
    other = VisualMemory(tmp_path / "other")
    with pytest.raises(IdentityMismatch, match=rf"by {ENCODER} \(fingerprint .*not by {ENCODER} .*crop 96"):
        other.add(tmp_path / "out", image_size=96, **options)


def test_fingerprints_of_before_stand() -> None:
    preprocessing = Preprocessing(resize=73, crop=64, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    identity = Identity(encoder="x", weights_sha256="0" * 64, preprocessing=preprocessing, dimension=8)
    assert identity.fingerprint == "b996fbea5bb2dfcecbb4412fa9cd3136a1d2eb9eb9eaf091edd31abfac81d25a"
    assert Identity.of_given("given", 8).fingerprint != Identity.of_given("given:a", 8).fingerprint


# Questions


def test_a_source_of_vectors_asks(memory: VisualMemory, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "asked", [60])
    evaluation = memory.evaluate(source, ks=[1, 5])
    assert evaluation.num_queries == 60
    report = memory.classify_source(source, tmp_path / "decided", k=5)
    assert (report.planned, report.decided) == (60, 60)
    decided = pq.read_table(tmp_path / "decided/decisions").to_pydict()
    right = np.mean([label == said for label, said in zip(decided["label"], decided["source_label"], strict=True)])
    assert evaluation.accuracy["rank"][5] == pytest.approx(100 * right)
    queries = np.load(source / "img_emb/img_emb_0.npy").astype(np.float32)
    assert decided["label"] == [decision.label for decision in memory.classify(embeddings=queries, k=5)]
    np.save(tmp_path / "wrong.npy", clustered(3, 8)[0])
    for ask in (memory.evaluate, lambda source: memory.classify_source(source, tmp_path / "nowhere")):
        with pytest.raises(SourceError, match="8 dimensions"):
            ask(tmp_path / "wrong.npy")


# The way back


@pytest.fixture(params=["clip-retrieval", "parquet"])
def file_format(request: pytest.FixtureRequest) -> str:
    return request.param


def test_exported_and_added_again_it_decides_alike(memory: VisualMemory, tmp_path: Path, file_format: str) -> None:
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more/100%.npy", clustered(9, seed=5)[0])
    memory.add(tmp_path / "more")
    ids = {uri: entry[0] for uri, entry in entries_of(memory).items()}
    before = memory.state().version
    gone = [uri for uri in ids if uri.endswith(("7.jpg", "100%25.npy#row=2"))]
    memory.forget(uris=gone)
    memory.relabel(ids=[ids["/data/00004 %234.jpg"]], label="lynx")
    memory.relabel(ids=[ids[f"{tmp_path}/more/100%25.npy#row=1"]], label="dog")
    moments = []
    report = memory.export(tmp_path / "out", file_format, rows_per_file=40, on_progress=moments.append)
    left = 139 - len(gone)
    assert (report.entries, report.files, report.version) == (left, -(-left // 40), memory.state().version)
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.*"))
    assert (moments[-1].done, moments[-1].total) == (left, left)
    back = VisualMemory(tmp_path / "back")
    back.add(tmp_path / "out", dataset="clip")
    assert decisions_of(back) == decisions_of(memory)
    assert {uri: (row[0], row[2]) for uri, row in rows_of(back).items()} == {
        uri: (row[0], row[2]) for uri, row in rows_of(memory).items()
    }
    assert not {n[0] for decision in decisions_of(back) for n in decision[2]} & set(gone)
    past = VisualMemory(memory.uri, at=before).export(tmp_path / "past", file_format)
    assert (past.entries, past.version) == (139, before)
    assert not [name for name in (tmp_path / "out").rglob("*") if name.name.startswith(".")]


def test_clip_retrieval_reads_what_is_exported(memory: VisualMemory, tmp_path: Path) -> None:
    """Its clip_back takes both kinds of files in the order of their names, and rows in that of the files."""
    memory.export(tmp_path / "out", rows_per_file=12)
    names = sorted(path.name for path in (tmp_path / "out/img_emb").iterdir())
    assert (names[0], names[-1], len(names)) == ("img_emb_0000.npy", "img_emb_0010.npy", 11)
    vectors = np.concatenate([np.load(path) for path in sorted((tmp_path / "out/img_emb").glob("*.npy"))])
    assert (vectors.dtype, vectors.shape, vectors.flags.c_contiguous) == (np.float16, (130, 16), True)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out/metadata").glob("*.parquet"))]
    rows = pa.concat_tables(tables)
    assert rows.column_names == ["image_path", "id", "uri", "label", "dataset", "sha256", "width", "height"]
    assert rows["image_path"][3].as_py() == "/data/00003 #3.jpg"
    assert set(rows["width"].to_pylist()) == {640}
    ids = rows["id"].to_numpy()
    assert np.array_equal(memory.live().vectors_of(ids).astype(np.float16), vectors)


def test_autofaiss_reads_what_is_exported(memory: VisualMemory, tmp_path: Path, file_format: str) -> None:
    """By way of embedding-reader, which pairs a .npy with its metadata as clip-retrieval's tools do."""
    memory.export(tmp_path / "out", file_format, rows_per_file=50)
    if file_format == "parquet":
        asked = {"embeddings_folder": str(tmp_path / "out"), "embedding_column": "embedding"}
    else:
        asked = {"embeddings_folder": str(tmp_path / "out/img_emb"), "metadata_folder": str(tmp_path / "out/metadata")}
    kind = "parquet" if file_format == "parquet" else "parquet_npy"
    reader = EmbeddingReader(**asked, meta_columns=["id", "uri"], file_format=kind)
    assert (reader.count, reader.dimension) == (130, 16)
    for vectors, rows in reader(batch_size=64, show_progress=False):
        assert np.array_equal(memory.live().vectors_of(rows["id"].to_numpy()), vectors.astype(np.float32))


def test_what_cannot_be_exported(memory: VisualMemory, tmp_path: Path, file_format: str) -> None:
    with pytest.raises(UsageError, match=r"memory has other files in it, such as .*: name an empty"):
        memory.export(memory.uri, file_format)
    with pytest.raises(UsageError, match="`rows_per_file` 0"):
        memory.export(tmp_path / "out", file_format, rows_per_file=0)
    with pytest.raises(UsageError, match="`file_format` csv is unknown: give clip-retrieval or parquet"):
        memory.export(tmp_path / "out", "csv")  # type: ignore[arg-type]
    storage = open_storage(memory.uri)
    with pytest.raises(MemoryMissing, match="has no entry at version 0"):
        export(storage, State(), open_storage(str(tmp_path / "out")))
    entries = next((tmp_path / "memory").glob("segments/*/entries/*.parquet"))
    damaged = bytearray(entries.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    entries.write_bytes(damaged)
    with pytest.raises(DamagedFile, match=r"segments/.* cannot be read .*restore it"):
        memory.export(tmp_path / "out", file_format)
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["exporting.json"], "nothing half written"


def test_single_adds_are_exported_too(digits_memory: VisualMemory, tmp_path: Path, file_format: str) -> None:
    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    [one] = memory.add_images([picture(1)], labels=["new"], uris=["u"])
    memory.forget(labels=["0"])
    memory.export(tmp_path / "out", file_format)
    back = VisualMemory(tmp_path / "back")
    back.add(tmp_path / "out")
    assert back.status()["entries"] == 81
    [[nearest]] = back.search(embeddings=memory.live().vectors_of(np.array([one])), k=1)
    assert (nearest.uri, nearest.label) == ("u", "new")


def test_kept_columns_come_with_vectors_and_go_with_an_export(tmp_path: Path, file_format: str) -> None:
    years = [2000 + row for row in range(12)]
    source = write_clip(tmp_path / "clip", [12], year=years)
    column = pa.array(list(clustered(3)[0]), pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": column, "year": ["1", "2", None]}), source / "t.parquet")
    memory = VisualMemory(tmp_path / "memory")
    memory.add(source, keep=["year", "caption"])
    memory.add(write_clip(tmp_path / "other", [4]))
    with pytest.raises(SourceError, match="nothing in the source has a column camera, it has caption"):
        memory.add(source, keep=["camera"])
    assert memory.verify().findings == ()
    memory.export(tmp_path / "out", file_format)
    back = VisualMemory(tmp_path / "back")
    back.add(tmp_path / "out", keep=["year", "caption"])
    for one in (memory, back):
        [found] = one.search(embeddings=clustered(12)[0][:1], k=1)
        assert found[0].kept == {"year": "2000", "caption": "a b"}
    assert decisions_of(back) == decisions_of(memory)
