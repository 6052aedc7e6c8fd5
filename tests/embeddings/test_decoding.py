"""Decoding: bounded, in order, the same wherever it is done. On other nodes for GPUs: here for claimed ones."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray import cloudpickle

from cluster.ray_nodes import RayHead, RayNode
from pipeline import VisualMemory
from pipeline.embeddings import decoding, on_ray
from pipeline.embeddings.decoding import BATCHES_AHEAD, BatchForm, Threads, begin_ahead
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.stages import Stages
from pipeline.errors import StorageError
from pipeline.images.containers.items import Item
from pipeline.images.decoding.decode import Rejected
from pipeline.store.segments.part_marks import read_marks
from pipeline.store.segments.reservations import read_reservation
from pipeline.store.tables.schemas import read_table
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.images.archives import tar_of
from tests.images.pictures import encoded

ROOT = Path(__file__).parents[2]
ADDRESSES = ("127.0.0.12", "127.0.0.13")


def items(number: int) -> list[Item]:
    return [Item(f"/{row}.png", None) for row in range(number)]


def test_no_more_batches_are_begun_ahead_than_asked_for() -> None:
    begun: list[int] = []
    ahead = begin_ahead(items(100), 10, lambda batch: begun.append(len(batch)), 3)
    for taken, (batch, _, _) in enumerate(ahead, 1):
        assert batch[0].uri == f"/{10 * taken - 10}.png"
        assert len(begun) <= taken + 3 + 1
    assert begun == [10] * 10


def test_what_the_items_raise_is_raised() -> None:
    def failing() -> Iterator[Item]:
        yield from items(5)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(begin_ahead(failing(), 10, lambda _: None, BATCHES_AHEAD))


def test_batches_have_black_pixels_where_there_is_no_image(encoder: Encoder) -> None:
    picture = encoded(Image.new("RGB", (40, 30), "red"), "PNG")
    form = BatchForm(4, encoder.identity.preprocessing)
    [batch] = Threads(2).batches([Item("a", None, picture), Item("b", None, b"none"), Item("c", None, picture)], form)
    assert batch.pixels_BSS3.shape == (4, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert [bool(pixels.any()) for pixels in batch.pixels_BSS3] == [True, False, True, False]
    assert [isinstance(image, Rejected) for image in batch.images] == [False, True, False]


def test_a_reject_can_travel() -> None:
    there = pickle.loads(pickle.dumps(Rejected("read", "the file is empty")))
    assert (there.stage, there.reason, str(there)) == ("read", "the file is empty", "the file is empty")


def test_a_batch_is_decoded_here_when_no_node_is_left_to_do_it(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[object] = []
    monkeypatch.setattr(on_ray.ray, "wait", lambda asked, timeout: ([], asked))
    monkeypatch.setattr(on_ray.ray, "cancel", cancelled.append)
    monkeypatch.setattr(on_ray.Helpers, "now", lambda: None)
    form = BatchForm(4, encoder.identity.preprocessing)
    batch = [Item("a", None, encoded(Image.new("RGB", (40, 30), "red"), "PNG"))]
    answer = on_ray.ClusterDecoding(1)._answer("asked", batch, form)
    assert cancelled == ["asked"]
    assert answer.pixels_BSS3[0].any()


def test_decoding_is_left_to_other_nodes_where_cores_are_few_or_were_too_few() -> None:
    few, many = on_ray.ClusterDecoding(1), on_ray.ClusterDecoding(on_ray.CORES_A_GPU)
    assert (few._starving, many._starving) == (True, False)
    many.learn(Stages(model=9, waiting=1, decoding=9))
    assert not many._starving
    many.learn(Stages(model=1, waiting=9, decoding=9))
    assert many._starving


def test_a_store_that_fails_in_a_task_is_told_as_it_would_be_here(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: str) -> bytes:
        raise StorageError("the store is gone")

    monkeypatch.setattr(decoding, "read_file", failing)
    task = on_ray._decode_task()._function
    answer = pickle.loads(pickle.dumps(task(items(3), BatchForm(4, encoder.identity.preprocessing))))
    assert (type(answer), str(answer)) == (StorageError, "the store is gone")
    monkeypatch.setattr(on_ray.ray, "wait", lambda asked, timeout: (asked, []))
    monkeypatch.setattr(on_ray.ray, "get", lambda asked: asked)
    with pytest.raises(StorageError, match="the store is gone"):
        on_ray.ClusterDecoding(1)._answer(answer, items(3), BatchForm(4, encoder.identity.preprocessing))


def test_a_process_that_decodes_waits_for_no_torch() -> None:
    task = cloudpickle.dumps(on_ray._decode_task()._function)
    code = "import sys; from ray import cloudpickle; cloudpickle.load(sys.stdin.buffer); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=task, capture_output=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == b"False"


ADD = """
import ray, sys
from pipeline import VisualMemory
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": sys.argv[5]}})
VisualMemory(sys.argv[2]).add(
    sys.argv[3], encoder=sys.argv[6], weights=sys.argv[4], weights_order="positional", image_size=int(sys.argv[7]),
    thumbnails=True, runner="ray")
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nodes_without_gpus_decode_for_one_that_has_too_few_cores(tmp_path: Path, weights: str) -> None:
    source = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    members = {}
    for number in range(300):
        pixels = generator.integers(0, 256, (60, 80, 3), np.uint8)
        data = b"broken" if number % 50 == 7 else encoded(Image.fromarray(pixels), "JPEG")
        path = source / f"{number % 3}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        members |= {f"{number:04d}.jpg": data} if number < 40 else {}
    (source / "archive.tar").write_bytes(tar_of(members))
    here = VisualMemory(tmp_path / "here")
    options = {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}
    here.add(source, thumbnails=True, **options)

    folder, token = Path(tempfile.mkdtemp(prefix="vm-")), "t" * 64
    head = RayHead(ADDRESSES[0], folder / "head", token, num_cpus=1, num_gpus=1)
    nodes: list[RayNode] = [head]
    try:
        head.wait_until_ready()
        nodes.append(RayNode(ADDRESSES[1], folder / "second", token, num_cpus=1, head=head))
        head.wait_until_ready(nodes[1])
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT)}
        words = [head.gcs, tmp_path / "there", source, weights, ROOT, ENCODER, IMAGE_SIZE]
        subprocess.run([sys.executable, "-c", ADD, *map(str, words)], env=environment, check=True)
    finally:
        for node in reversed(nodes):
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)

    there = VisualMemory(tmp_path / "there")
    reservation = read_reservation(there.log.storage, 1)
    assert reservation is not None
    marks = read_marks(there.log.storage, reservation).values()
    assert {(mark.node, mark.decoded_on) for mark in marks} == {(ADDRESSES[0], (ADDRESSES[1],))}
    assert len(marks) == 4
    for kind in ("entries", "rejected", "thumbnails"):
        ours, theirs = (_rows(memory, kind) for memory in (here, there))
        assert ours.equals(theirs), kind
        assert ours.num_rows == {"entries": 333, "rejected": 7, "thumbnails": 333}[kind]


def _rows(memory: VisualMemory, kind: str) -> pa.Table:
    [segment] = memory.state().segments
    return pa.concat_tables([read_table(memory.log.storage, file) for file in getattr(segment, kind)]).sort_by("id")
