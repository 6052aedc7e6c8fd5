"""Where the time goes: measured by stage, and judged."""

import time
from pathlib import Path

import pytest

from pipeline.embeddings import decoding
from pipeline.embeddings.decoding import Threads
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.stages import Stages
from pipeline.embeddings.stream import embed_items
from pipeline.images.containers.items import Item


@pytest.mark.parametrize(
    ("stages", "bound", "advice"),
    [
        (Stages(decoding=9, waiting=1, model=9), "device", "90%"),
        (Stages(reading=1, decoding=20, waiting=6, model=4), "decoding", "waited 60%"),
        (Stages(reading=30, decoding=20, waiting=6, model=4), "storage", "tar archives"),
        (Stages(waiting=1, model=4, writing=5), "storage", "writing took 50%"),
    ],
)
def test_verdicts(stages: Stages, bound: str, advice: str) -> None:
    verdict = stages.verdict()
    assert verdict is not None
    assert verdict[0] == bound
    assert advice in verdict[1]


def test_no_run_has_no_verdict() -> None:
    assert Stages(reading=1).verdict() is None


def test_slow_reading_is_told_from_slow_decoding(
    encoder: Encoder, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(path) for path in sorted((digits / "remember").rglob("*.png"))[: 4 * encoder.batch_size]]
    read_file = decoding.read_file

    def slowly(uri: str) -> bytes:
        time.sleep(0.05)
        return read_file(uri)

    fast, slow = Stages(), Stages()
    list(embed_items(encoder, [Item(path, None) for path in paths], Threads(2), stages=fast))
    monkeypatch.setattr(decoding, "read_file", slowly)
    list(embed_items(encoder, [Item(path, None) for path in paths], Threads(2), stages=slow))
    assert slow.reading > 0.05 * len(paths) > fast.reading
    assert slow.waiting > fast.waiting
    assert slow.reading > slow.decoding > 0 < fast.model
