"""Precision: measured on real images, decided once for a segment, never mixed, and no matter of the identity."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import VisualMemory
from pipeline.edits.add import AddOptions
from pipeline.embeddings import numerics
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.numerics import encoder_in, measure, needs_measuring
from pipeline.embeddings.parts import Remember
from pipeline.embeddings.stages import Stages
from pipeline.errors import EncoderError, UsageError
from pipeline.progress import Progress
from pipeline.store.segments.reservations import Numerics, Reservation, read_numerics, read_reservation
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.edits.test_add import many_pictures, rows_of


@pytest.fixture
def options(weights: str) -> dict:
    return {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def reservation_of(memory: VisualMemory, number: int = 1) -> Reservation:
    reservation = read_reservation(memory.log.storage, number)
    assert reservation is not None
    return reservation


def test_this_encoder_is_not_let_into_bfloat16(encoder: Encoder, pixels: np.ndarray) -> None:
    found = measure(encoder, pixels, compiling=False)
    assert (found.precision, found.compiled) == ("float32", False)
    assert "at the first percentile of 5 images, less than 0.999" in found.reason
    assert encoder_in(encoder, found) is encoder


def test_what_hardly_moves_is_let_in(encoder: Encoder, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "LEAST_COSINE", 0.9)
    found = measure(encoder, pixels, compiling=False)
    assert (found.precision, found.compiled) == ("bfloat16", False)
    fast = encoder_in(encoder, found)
    cosines = (fast.embed(pixels) * encoder.embed(pixels)).sum(axis=1)
    assert 0.9 < cosines.min() < 0.999999
    assert (fast.embed_queries(pixels) == encoder.embed_queries(pixels)).all()


def test_what_cannot_be_compiled_is_not(encoder: Encoder, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(numerics, "LEAST_COSINE", 0.9)
    monkeypatch.setattr(torch, "compile", no_compiler)
    found = measure(encoder, pixels, compiling=True)
    assert (found.precision, found.compiled) == ("bfloat16", False)
    assert f"{ENCODER} cannot be compiled (no compiler)" in found.reason
    with pytest.raises(EncoderError, match="cannot be compiled"):
        encoder.compiled()
    elsewhere = encoder_in(encoder, Numerics(precision="bfloat16", compiled=True, reason="said"))
    assert np.isfinite(elsewhere.embed(pixels)).all()


def test_an_encoder_is_compiled_for_its_batch(
    encoder: Encoder, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def compiler(model: torch.nn.Module, *, dynamic: bool) -> object:
        assert not dynamic
        return lambda inputs: (shapes.append(tuple(inputs.shape)), model(inputs))[1]

    monkeypatch.setattr(torch, "compile", compiler)
    encoder.compiled()
    assert shapes == [(encoder.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)]


def test_on_a_cpu_nothing_is_measured_unless_asked_for(tmp_path: Path, digits: Path, options: dict) -> None:
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(digits / "ask", **options)
    assert report.numerics is None
    assert report.to_json()["precision"] == "float32"
    assert reservation_of(memory).precision == "auto"
    report = memory.add(digits / "remember", precision="float32")
    assert reservation_of(memory, 2).precision == "float32"


def test_asked_for_it_is_measured_and_what_came_of_it_told(tmp_path: Path, digits: Path, options: dict) -> None:
    exact, memory = VisualMemory(tmp_path / "exact"), VisualMemory(tmp_path / "memory")
    exact.add(digits / "ask", **options)
    report = memory.add(digits / "ask", precision="bfloat16", **options)
    assert report.numerics is not None
    assert (report.numerics.precision, report.to_json()["precision"]) == ("float32", "float32")
    assert "of 50 images" in report.numerics.reason
    assert rows_of(memory).equals(rows_of(exact))
    assert memory.add(digits / "ask").already == 1  # the same source, whatever it is embedded in
    assert not memory.verify(clean=True).findings
    memory.copy(tmp_path / "copy")
    assert read_numerics(VisualMemory(tmp_path / "copy").log.storage, reservation_of(memory)) == report.numerics


class Stopped(Exception):
    pass


def test_parts_of_a_segment_never_mix(
    tmp_path: Path, options: dict, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "LEAST_COSINE", 0.9)
    source = many_pictures(tmp_path / "pictures", 150)
    memory, undisturbed = VisualMemory(tmp_path / "memory"), VisualMemory(tmp_path / "undisturbed")

    def stop(moment: Progress) -> None:
        if moment.done:
            raise Stopped

    with pytest.raises(Stopped):
        memory.add(source, precision="bfloat16", on_progress=stop, **options)
    monkeypatch.setattr(numerics, "LEAST_COSINE", 1.1)  # it would be decided otherwise now
    report = memory.add(source, **options)
    assert report.numerics is not None
    assert (report.segment, report.numerics.precision) == (1, "bfloat16")
    monkeypatch.setattr(numerics, "LEAST_COSINE", 0.9)
    undisturbed.add(source, precision="bfloat16", **options)
    assert rows_of(memory).equals(rows_of(undisturbed))


def test_parts_that_were_embedded_before_anything_was_decided_decide(
    tmp_path: Path, digits: Path, options: dict, encoder: Encoder
) -> None:
    memory = VisualMemory(tmp_path / "memory")
    memory.add(digits / "ask", **options)
    reservation = reservation_of(memory).model_copy(update={"precision": "bfloat16"})
    assert not needs_measuring(memory.log.storage, reservation, encoder)
    Remember(memory.log.storage, reservation).open(1, encoder=encoder).embed(0, Stages())
    assert read_numerics(memory.log.storage, reservation) is None


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="give auto, float32 or bfloat16"):
        AddOptions(precision="float8")  # type: ignore[arg-type]
