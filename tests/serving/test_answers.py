"""Answers over HTTP against the library's, on real images, with one group and with several, without Ray."""

import base64
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.decisions.voting import VOTINGS
from pipeline.errors import DamagedFile
from pipeline.index.build.plan import IndexOptions
from pipeline.store.log.state import State
from pipeline.store.lookup import kept_values
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.schemas import embedding_column
from tests.conftest import ENCODER, IMAGE_SIZE, unit
from tests.serving.serving import Served, served

TOKEN = "a token of the tests"


@pytest.fixture(scope="module")
def memory(digits: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> VisualMemory:
    """Digits in three exact shards, others fresh, one entry forgotten and one relabelled."""
    place = tmp_path_factory.mktemp("served")
    memory = VisualMemory(place / "memory")
    for digit in range(5):
        if digit == 3:
            memory.index(IndexOptions(key="Flat", shard_rows=20))
        shutil.copytree(digits / "remember" / str(digit), place / f"source {digit}" / str(digit))
        memory.add(
            place / f"source {digit}",
            encoder=ENCODER,
            weights=weights,
            weights_order="positional",
            image_size=IMAGE_SIZE,
        )
    ids = memory.live().live_ids()
    memory.forget(ids=[int(ids[3])])
    memory.relabel(ids=[int(ids[50])], label="seven")
    memory.relabel(label_set="parity", map={"0": "even", "1": "odd", "2": "even", "3": "odd"})
    return memory


@pytest.fixture(scope="module")
def asked(digits: Path) -> list[Path]:
    return sorted((digits / "ask").rglob("*.png"))[::7]


@pytest.fixture(scope="module", params=[1, 3], ids=["one group", "three groups"])
def server(request: pytest.FixtureRequest, memory: VisualMemory) -> Iterator[Served]:
    with served(memory.uri, request.param, token=TOKEN) as server:
        yield server


def as_json(decision: Any) -> dict:
    return json.loads(json.dumps(decision.to_json()))


@pytest.mark.parametrize("voting", VOTINGS)
def test_decisions_are_those_of_the_library(
    server: Served, memory: VisualMemory, asked: list[Path], voting: Any
) -> None:
    ids = memory.live().live_ids()
    for options in (
        {},
        {"k": 7, "label_set": "parity"},
        {"k": 9, "exclude": [int(ids[0]), int(ids[60])], "weigh": {int(ids[1]): 0.25}, "assume": {int(ids[5]): "new"}},
        {"k": 5, "balance": 0.5, "abstain_below": 0.9},
        {"k": 5, "where": "label != '0'"},
    ):
        expected = [as_json(d) for d in memory.classify([p.read_bytes() for p in asked], voting=voting, **options)]
        said = {**options, "voting": voting}
        said |= {name: {str(i): v for i, v in said[name].items()} for name in ("weigh", "assume") if name in said}
        images = [base64.b64encode(path.read_bytes()).decode() for path in asked]
        batch = server.post("/v1/classify", {"image_base64": images, **said}).json()
        assert [{**answer} for answer in batch] == [{**answer, "partial": False} for answer in expected]
        alone = [server.post("/v1/classify", {"image_base64": image, **said}).json() for image in images]
        assert alone == batch
        listed = server.post("/v1/classify", [{"image_base64": image, **said} for image in images]).json()
        assert listed == batch


def test_a_balance_chosen_by_itself_is_the_librarys(server: Served, memory: VisualMemory, asked: list[Path]) -> None:
    expected = memory.classify([asked[0].read_bytes()], k=5, balance="auto")[0]
    found = server.post("/v1/classify", {"image_base64": encoded(asked[0]), "k": 5, "balance": "auto"}).json()
    assert found == {**as_json(expected), "partial": False}


def test_neighbours_are_those_of_the_library(server: Served, memory: VisualMemory, asked: list[Path]) -> None:
    vectors = memory.live().vectors_of(memory.live().live_ids()[:5]).astype(np.float64)
    expected = [[n.to_json() for n in found] for found in memory.search(embeddings=vectors, k=6)]
    found = server.post("/v1/search", {"embedding": vectors.tolist(), "k": 6}).json()
    assert [answer["neighbors"] for answer in found] == expected
    assert {(a["version"], a["shards_answered"], a["shards_total"]) for a in found} == {(memory.state().version, 3, 3)}
    by_image = memory.search([asked[0].read_bytes()], k=4)[0]
    files = {"image": asked[0].read_bytes()}
    answer = server.http.post("/v1/search", files=files, data={"k": "4"}).json()
    assert answer["neighbors"] == [n.to_json() for n in by_image]


def test_a_form_takes_every_option(server: Served, memory: VisualMemory, asked: list[Path]) -> None:
    ids = [int(entry_id) for entry_id in memory.live().live_ids()[:4]]
    expected = memory.classify(
        [asked[1].read_bytes()], k=6, voting="softmax", exclude=ids[:2], weigh={ids[2]: 0.5}, assume={ids[3]: "x"}
    )[0]
    data = {"k": "6", "voting": "softmax", "exclude": ids[:2], "weigh": f"{ids[2]}=0.5", "assume": f"{ids[3]}=x"}
    answer = server.http.post("/v1/classify", files={"image": asked[1].read_bytes()}, data=data).json()
    assert answer == {**as_json(expected), "partial": False}
    both = [("image", asked[1].read_bytes()), ("image", asked[2].read_bytes())]
    assert len(server.http.post("/v1/classify", files=both).json()) == 2


def test_an_entry_and_its_picture(server: Served, memory: VisualMemory) -> None:
    live = memory.live()
    entry_id = int(live.live_ids()[7])
    answer = server.http.get(f"/v1/entries/{entry_id}").json()
    assert (answer["id"], answer["width"], answer["height"]) == (entry_id, 28, 28)
    assert answer["uri"] == memory.search(embeddings=live.vectors_of(np.array([entry_id])), k=1)[0][0].uri
    picture = server.http.get(f"/v1/entries/{entry_id}/image")
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content[:2] == b"\xff\xd8"
    assert server.http.get("/v1/entries/12345").status_code == 404


def test_clients_of_clip_retrieval_are_answered(server: Served, memory: VisualMemory, asked: list[Path]) -> None:
    found = memory.search([asked[0].read_bytes()], k=5)[0]
    body = {
        "text": None, "image": encoded(asked[0]), "image_url": None, "embedding_input": None, "deduplicate": True,
        "use_safety_model": True, "use_violence_detector": True, "indice_name": "any", "use_mclip": False,
        "aesthetic_score": 9, "aesthetic_weight": 0.5, "modality": "image", "num_images": 5, "num_result_ids": 5,
    }  # fmt: skip
    answer = server.post("/knn-service", body).json()
    assert [(a["id"], a["similarity"], a["url"]) for a in answer] == [(n.id, n.similarity, n.uri) for n in found]
    refused = server.post("/knn-service", {**body, "image": None, "text": "a cat"})
    assert (refused.status_code, refused.json()["field"]) == (422, "text")


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> VisualMemory:
    """Vectors with a year each: three shards and fresh entries."""
    folder = tmp_path_factory.mktemp("keeping")
    memory = VisualMemory(folder / "memory")
    for name in "abcd":
        vectors_ND = unit(np.random.default_rng(ord(name)).normal(size=(120, 16)))
        years = [2_000 + row % 20 for row in range(120)]
        (folder / name).mkdir()
        table = pa.table({"embedding": embedding_column(vectors_ND), "year": years})
        pq.write_table(table, folder / name / "vectors.parquet")
        memory.add(folder / name, labels="none", keep=["year"])
        if name == "c":
            memory.index(IndexOptions(key="Flat", shard_rows=120))
    return memory


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_kept_columns_are_read_of_the_nearest_over_all_groups(
    groups: int, keeping: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, read = np.random.default_rng(1).normal(size=(3, 16)), list[int]()
    read_kept = kept_values.read_kept

    def watched(storage: Storage, state: State, ids: Sequence[int]) -> dict:
        read.extend(ids)
        return read_kept(storage, state, ids)

    with served(keeping.uri, groups) as server:
        monkeypatch.setattr("pipeline.serving.service.group.read_kept", watched)
        for where in (None, "year >= 2010"):
            expected = [[n.to_json() for n in found] for found in keeping.search(embeddings=queries, k=5, where=where)]
            assert expected[0][0]["kept"]["year"] >= 2_000
            read.clear()
            found = server.post("/v1/search", {"embedding": queries.tolist(), "k": 5, "where": where}).json()
            assert [answer["neighbors"] for answer in found] == expected
            assert sorted(read) == sorted({n["id"] for neighbors in expected for n in neighbors})
        answer = server.post("/v1/classify", {"embedding": queries[0].tolist()})
        assert answer.status_code == 200


def test_a_group_whose_kept_columns_cannot_be_read_is_left_out(
    keeping: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = np.random.default_rng(2).normal(size=16)
    [nearest] = keeping.search(embeddings=query[None], k=480)
    read_kept = kept_values.read_kept
    damaged = nearest[0].id >> 39  # the segment of the nearest entry, all in one group

    def failing(storage: Storage, state: State, ids: Sequence[int]) -> dict:
        if damaged in {entry_id >> 39 for entry_id in ids}:
            raise DamagedFile("it was altered")
        return read_kept(storage, state, ids)

    with served(keeping.uri, 3) as server:
        monkeypatch.setattr("pipeline.serving.service.group.read_kept", failing)
        answer = server.post("/v1/search", {"embedding": query.tolist(), "k": 12}).json()
        assert answer["partial"]
        found = [neighbor["id"] for neighbor in answer["neighbors"]]
        assert len(found) == 12
        assert damaged not in {entry_id >> 39 for entry_id in found}
        segments = {entry_id >> 39 for entry_id in found}
        assert found == [n.id for n in nearest if n.id >> 39 in segments][:12]
        assert all(neighbor["kept"]["year"] >= 2_000 for neighbor in answer["neighbors"])
        whole = server.post("/v1/search", {"embedding": query.tolist(), "k": 12, "require_all": True})
        assert whole.status_code == 503


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
