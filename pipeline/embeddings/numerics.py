"""Decides the precision in which the images of a segment are embedded: once, by measurement, for all workers and runs.

bfloat16 is several times faster on a GPU, and changes vectors a little. It is used only if the vectors of real images
of the segment stay close to their float32 vectors.
"""

from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import EncoderError
from pipeline.plain_log import plain_logger
from pipeline.store.segments.part_marks import marks_of
from pipeline.store.segments.reservations import Numerics, Reservation, read_numerics, record_numerics
from pipeline.store.storage.interface import Storage

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder

MEASURED_IMAGES = 256
LEAST_COSINE = 0.999  # least cosine to float32, at the first percentile of the measured images

# Compiling takes 30 to 60 s in each process. On an H100 it gains 4% of 2,500 images/s (ViT-L/16) to 12% of 17,000
# (ViT-S/16), by timm's benchmarks of 2026-04: 2 million images win 30 s back.
COMPILE_FROM = 2_000_000

logger = plain_logger(__name__)


def needs_measuring(storage: Storage, reservation: Reservation, encoder: "Encoder") -> bool:
    """Whether a decision by measurement is still to be made.

    A segment that has finished parts and no decision needs none: those parts are in float32.
    """
    if reservation.precision == "float32" or read_numerics(storage, reservation) is not None:
        return False
    if reservation.precision == "auto" and encoder.device.type != "cuda":
        return False
    return not marks_of(storage, reservation)


def decide(storage: Storage, reservation: Reservation, encoder: "Encoder", pixels_NSS3: np.ndarray) -> Numerics:
    """Measure on uint8 [N, S, S, 3] pixels of the segment and record the decision.

    Returns the recorded decision; if another worker was first, that is its decision.
    """
    compiling = encoder.device.type == "cuda" and reservation.num_images(0) >= COMPILE_FROM
    return record_numerics(storage, reservation, measure(encoder, pixels_NSS3, compiling=compiling))


def measure(encoder: "Encoder", pixels_NSS3: np.ndarray, *, compiling: bool) -> Numerics:
    """bfloat16 if its vectors have LEAST_COSINE to the float32 vectors; compiled if asked for and possible."""
    exact_ND = _embedded(encoder, pixels_NSS3)
    fast = encoder.in_bfloat16()
    cosine = _first_percentile(exact_ND, _embedded(fast, pixels_NSS3))
    reason = f"the cosine of bfloat16 to float32 is {cosine:.5f} at the first percentile of {len(exact_ND)} images"
    if cosine < LEAST_COSINE:
        return Numerics(precision="float32", reason=f"{reason}, less than {LEAST_COSINE}")
    if not compiling:
        return Numerics(precision="bfloat16", reason=reason)
    try:
        cosine = _first_percentile(exact_ND, _embedded(fast.compiled(), pixels_NSS3))
    except EncoderError as error:
        return Numerics(precision="bfloat16", reason=f"{reason}; {error}")
    if cosine < LEAST_COSINE:
        return Numerics(precision="bfloat16", reason=f"{reason}; compiled it would be {cosine:.5f}")
    return Numerics(precision="bfloat16", compiled=True, reason=reason)


def encoder_in(encoder: "Encoder", numerics: Numerics | None) -> "Encoder":
    """The encoder in the precision recorded for the segment (None: float32)."""
    if numerics is None or numerics.precision == "float32":
        return encoder
    fast = encoder.in_bfloat16()
    if not numerics.compiled:
        return fast
    try:
        return fast.compiled()
    except EncoderError as error:  # only this node runs uncompiled: slower, and within the accepted drift
        logger.warning("%s", error)
        return fast


def _embedded(encoder: "Encoder", pixels_NSS3: np.ndarray) -> np.ndarray:
    """Vectors float64 [N, D], embedded in batches of the encoder's size."""
    size, number = encoder.batch_size, len(pixels_NSS3)
    padding = np.zeros((-number % size, *pixels_NSS3.shape[1:]), np.uint8)
    padded = np.concatenate([pixels_NSS3, padding])
    vectors = [encoder.embed(padded[start : start + size]) for start in range(0, len(padded), size)]
    vectors_ND: np.ndarray = np.concatenate(vectors)[:number].astype(np.float64)
    return vectors_ND


def _first_percentile(one_ND: np.ndarray, other_ND: np.ndarray) -> float:
    return float(np.percentile((one_ND * other_ND).sum(axis=1), 1))
