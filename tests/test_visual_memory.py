"""The face of the library: what may be handed over, and what is said of everything else."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.errors import SourceError, UsageError
from pipeline.store.storage.interface import AlreadyExists
from pipeline.store.storage.local import LocalStorage


@pytest.fixture
def image(digits: Path) -> Path:
    return next((digits / "ask/2").iterdir())


def test_an_image_may_come_in_many_ways(digits_memory: VisualMemory, image: Path) -> None:
    ways = [image, str(image), f"file://{image}", image.read_bytes(), Image.open(image)]
    decisions = digits_memory.classify(ways, k=7)
    assert len({(d.label, d.confidence, d.neighbors) for d in decisions}) == 1
    assert [d.uri for d in decisions] == [str(image)] * 3 + [None] * 2


# Scaled, float16 would round to other vectors.
@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float16, 1.0), *itertools.product((np.float32, np.float64), (1.0, 1e4, 1e-4))]
)
def test_embeddings_of_any_length_and_type_ask_the_same(digits_memory: VisualMemory, dtype: type, scale: float) -> None:
    live = digits_memory.live()
    vectors = live.vectors_of(live.live_ids()[:3])
    expected = [[n.id for n in found] for found in digits_memory.search(embeddings=vectors, k=5)]
    found = digits_memory.search(embeddings=(vectors * scale).astype(dtype).tolist(), k=5)
    assert [[n.id for n in neighbors] for neighbors in found] == expected


def test_huge_embeddings_do_not_overflow(digits_memory: VisualMemory) -> None:
    live = digits_memory.live()
    vectors = live.vectors_of(live.live_ids()[:3]).astype(np.float64)
    expected = digits_memory.search(embeddings=vectors, k=5)
    assert digits_memory.search(embeddings=vectors * 1e300, k=5) == expected


Ask = Callable[[VisualMemory, Path], object]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m, i: m.classify(str(i)), "images is '.*': give a list"),
        (lambda m, i: m.classify(i), "give a list"),
        (lambda m, i: m.classify(i.read_bytes()), "images is one bytes: give a list"),
        (lambda m, i: m.classify(None), "images is None: give a list"),
        (lambda m, i: m.classify([]), "give at least one image"),
        (lambda m, i: m.classify([i], embeddings=np.ones((1, 1280))), "both images and embeddings"),
        (lambda m, i: m.classify([i], k=0), "k = 0 is not a number of neighbours"),
        (lambda m, i: m.classify([i], k=1.5), "k = 1.5 is not a number of neighbours"),
        (lambda m, i: m.classify([i], k="5"), "k = 5 is not a number of neighbours"),
        (lambda m, i: m.classify([i], voting="most"), "voting most is unknown"),
        (lambda m, i: m.classify([i], voting=["rank"]), "is unknown"),
        (lambda m, i: m.classify([i], balance="strong"), "balance strong is not a strength"),
        (lambda m, i: m.classify([i], exclude="5"), "exclude is '5': give a list"),
        (lambda m, i: m.search(embeddings=np.ones(1280)), r"shape \[1280\]: give \[queries, 1280\]"),
        (lambda m, i: m.search(embeddings=np.ones((1, 7))), r"shape \[1, 7\]"),
        (lambda m, i: m.search(embeddings=np.full((1, 1280), np.nan)), "zero or not finite"),
        (lambda m, i: m.search(embeddings=np.zeros((1, 1280))), "zero or not finite"),
        (lambda m, i: m.search(embeddings=[["a"] * 1280]), "no array of numbers"),
        (lambda m, i: m.evaluate(i.parent.parent, ks=5), "ks is 5: give a list"),
        (lambda m, i: m.evaluate(i.parent.parent, votings="rank"), "votings is 'rank': give a list"),
        (lambda m, i: m.forget(labels="12"), r"labels is '12': give a list, such as \['12'\]"),
        (lambda m, i: m.forget(ids=5), "ids is 5: give a list"),
        (lambda m, i: m.add(i, runner="gpu"), "runner gpu is unknown"),
        (lambda m, i: m.forget(), "nothing was named"),
    ],
)
def test_wrong_values_are_wrong_usage(digits_memory: VisualMemory, image: Path, ask: Ask, message: str) -> None:
    before = digits_memory.state()
    with pytest.raises(UsageError, match=message) as caught:
        ask(digits_memory, image)
    assert len(str(caught.value)) < 400
    assert digits_memory.state() == before


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (np.zeros((28, 28)), "a query image is a ndarray: give a path, bytes, or a PIL image"),
        (None, "a query image is a NoneType"),
        (b"", "the image given as bytes cannot be used"),
        (b"text", "the image given as bytes cannot be used"),
        ("nowhere.png", "there is no such file"),
        ("a\0b.png", "cannot be used"),
        (Image.new("RGB", (0, 0)), "the PIL image given cannot be used"),
    ],
)
def test_what_is_no_image_is_named(digits_memory: VisualMemory, query: object, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        digits_memory.classify([query])  # type: ignore[list-item]


def test_forgetting_takes_arrays_of_ids_and_paths(digits: Path, tmp_path: Path, weights: str) -> None:
    memory = VisualMemory(tmp_path / "memory")
    memory.add(
        digits / "ask", encoder="tf_efficientnet_lite0", weights=weights, weights_order="positional", image_size=64
    )
    ids = memory.live().live_ids()
    path = next((digits / "ask/4").iterdir())
    assert memory.forget(ids=ids[:2]).forgotten == 2
    assert memory.forget(uris=[path]).forgotten == 1
    assert memory.forget(uris=[f"file://{next((digits / 'ask/3').iterdir())}"]).forgotten == 1
    memory.forget(datasets=["ask"])
    with pytest.raises(SourceError, match="has no entry with a label"):
        memory.evaluate(digits / "ask")


def test_every_answer_of_the_store_is_lost(
    digits_memory: VisualMemory, digits: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that makes each file and says the name was taken, as a request does that is repeated."""
    create = LocalStorage.create

    def lost(storage: LocalStorage, path: str, data: bytes) -> None:
        create(storage, path, data)
        raise AlreadyExists(path)

    undisturbed = digits_memory.copy(tmp_path / "undisturbed").uri
    monkeypatch.setattr(LocalStorage, "create", lost)
    memory = VisualMemory(digits_memory.copy(tmp_path / "memory").uri)
    added = memory.add(digits / "ask")
    assert (added.segment, memory.add(image).segment) == (2, 3)
    decided = memory.classify_source(digits / "ask", tmp_path / "decisions")
    assert memory.verify().sound
    monkeypatch.undo()
    other = VisualMemory(undisturbed)
    other.add(digits / "ask")
    other.add(image)
    assert decided.decided == other.classify_source(digits / "ask", tmp_path / "others").decided == 50
    assert other.search([image], k=100) == memory.search([image], k=100)


def test_an_evaluation_knows_its_options(digits_memory: VisualMemory, digits: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'wher'"):
        digits_memory.evaluate(digits / "ask", wher="id > 3")  # type: ignore[call-arg]
