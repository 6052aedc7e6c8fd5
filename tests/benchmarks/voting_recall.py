"""What recall is worth to a vote: the accuracy of every voting with the neighbours that searches of less effort find.

    python -m tests.benchmarks.voting_recall --vectors FOLDER --out FOLDER [--dimensions 256 1280] [--queries 10000]

The memory holds the training images that `vectors.py` writes, in five views each, and then in one (the whole image), as
the views of an image are near-duplicates of one another. The queries are the test images, whole. A search is exact; or
an inverted file of float16 vectors, which are exact, at an effort; or of fast-scan codes, at one effort, with the best
candidates ranked by their true similarities, or with none of that: then a vote is weighed by what the codes say.
`difference` is the accuracy less that of exact search, in percent of the queries, and `error` its standard error, of
the differences query by query. Prints one JSON document, and keeps it in --out beside a plot for a light page and a
dark one.

Shapes: Q queries, N rows, D dimensions, K neighbours, C classes.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from pipeline.decisions.voting import VOTINGS, VotingRule, count_votes
from tests.benchmarks import measuring
from tests.benchmarks.measuring import BLOCK, Truth, true_similarities
from tests.benchmarks.vectors import VIEWS, RealVectors

COUNTS = (10, 50)  # neighbours that vote
RANKED = (10, 20, 50, 100, 400)  # candidates ranked by their true similarities
LISTS_VISITED = 64  # of codes, so that it is the codes that lose neighbours
ROWS_A_LIST = 500
DIMENSIONS_A_CODE = (2, 8)  # of four bits: fine and coarse
TRAINING_ROWS_A_LIST = 100


@dataclass(frozen=True)
class Found:
    """What a search found: rows int64 and the similarities it says, float32, both [Q, K], the best first."""

    kind: str
    effort: int
    rows_QK: np.ndarray
    similarities_QK: np.ndarray


def trained(base_ND: np.ndarray, key: str) -> faiss.IndexIVF:
    """An inverted file over all rows."""
    index = faiss.index_factory(base_ND.shape[1], key, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    if isinstance(index, faiss.IndexIVFScalarQuantizer):
        index.by_residual = False  # the stored float16 themselves
    rows = min(len(base_ND), index.nlist * TRAINING_ROWS_A_LIST)
    sample_N = np.sort(np.random.default_rng(1).choice(len(base_ND), rows, replace=False))
    index.train(np.ascontiguousarray(base_ND[sample_N], np.float32))
    for start in range(0, len(base_ND), BLOCK):
        index.add(np.ascontiguousarray(base_ND[start : start + BLOCK], np.float32))
    return index


def searches(truth: Truth) -> Iterator[Found]:
    """Searches of all kinds, for the most neighbours that vote."""
    base_ND, queries_QD, k = truth.base_ND, truth.queries_QD, max(COUNTS)
    rows, dimension = base_ND.shape
    lists = 1 << (max(rows // ROWS_A_LIST, 1).bit_length() - 1)
    yield Found("exact", 0, truth.rows_QK[:, :k], truth.similarities_QK[:, :k])
    vectors = trained(base_ND, f"IVF{lists},SQfp16")
    for visited in sorted({*(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < lists), lists}):
        vectors.nprobe = visited
        similarities_QK, found_QK = vectors.search(queries_QD, k)
        yield Found(f"IVF{lists},SQfp16", visited, found_QK, similarities_QK)
    del vectors
    for width in DIMENSIONS_A_CODE:
        key = f"IVF{lists},PQ{dimension // width}x4fs"
        codes = trained(base_ND, key)
        codes.nprobe = min(LISTS_VISITED, lists)
        said_QK, found_QK = codes.search(queries_QD, max(RANKED))
        yield Found(f"{key} as coded", 0, found_QK[:, :k], said_QK[:, :k])
        true_QK = true_similarities(base_ND, queries_QD, found_QK)
        for count in RANKED:
            yield Found(f"{key} ranked", count, *ranked(found_QK[:, :count], true_QK[:, :count], k))


def ranked(rows_QK: np.ndarray, similarities_QK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k candidates by similarity, missing ones at the end: rows and similarities [Q, k]."""
    order_QK = np.argsort(-similarities_QK, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - order_QK.shape[1]))
    return (
        np.pad(np.take_along_axis(rows_QK, order_QK, axis=1), missing, constant_values=-1),
        np.pad(np.take_along_axis(similarities_QK, order_QK, axis=1), missing, constant_values=-np.inf),
    )


def right_votes(found: Found, labels_N: np.ndarray, truths_Q: np.ndarray) -> dict[str, np.ndarray]:
    """For each voting and number of neighbours which queries it gets right, bool [Q]."""
    counts_C = np.bincount(labels_N, minlength=int(truths_Q.max()) + 1)
    right = {}
    for k in COUNTS:
        rows_QK = found.rows_QK[:, :k]
        codes_QK = np.where(rows_QK >= 0, labels_N[rows_QK], -1)
        similarities_QK = np.where(rows_QK >= 0, found.similarities_QK[:, :k], -np.inf)
        for voting in VOTINGS:
            votes = count_votes(similarities_QK, codes_QK, VotingRule(voting), counts_C)
            right[f"{voting}, k = {k}"] = votes.winners_Q == truths_Q
    return right


def compared(truth: Truth, labels_N: np.ndarray, truths_Q: np.ndarray) -> list[dict]:
    """Every search beside the exact one, which is the first."""
    results: list[dict] = []
    exact: dict[str, np.ndarray] = {}
    for found in searches(truth):
        right = right_votes(found, labels_N, truths_Q)
        exact = exact or right
        result: dict = {"search": found.kind, "effort": found.effort}
        result |= {f"recall_at_{k}": round(truth.recall(found.rows_QK, k), 5) for k in COUNTS}
        result["votings"] = {}
        for name, right_Q in right.items():
            gained_Q = right_Q.astype(np.float64) - exact[name]
            result["votings"][name] = {
                "accuracy": round(100 * float(right_Q.mean()), 3),
                "difference": round(100 * float(gained_Q.mean()), 3),
                "error": round(100 * float(gained_Q.std(ddof=1)) / len(gained_Q) ** 0.5, 3),
            }
        results.append(result)
        print(result["search"], result["effort"], result["recall_at_10"], file=sys.stderr, flush=True)
    return results


def draw(document: dict, out: Path) -> None:
    """The difference to exact search against recall@10, one panel for each memory."""
    from matplotlib import pyplot

    from tests.benchmarks.index_plots import INKS, MARKERS, PEERS, coloured, save

    shown = "rank, k = 50"
    memories = document["memories"]
    for theme, (ink, grid, _) in INKS.items():
        figure, row = pyplot.subplots(
            1, len(memories), figsize=(1.6 + 4.2 * len(memories), 4.6), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, memory in zip(row[0], memories, strict=True):
            kinds = dict.fromkeys(point["search"] for point in memory["searches"] if point["search"] != "exact")
            for kind, colour, marker in zip(kinds, PEERS[theme], MARKERS, strict=False):
                points = [point for point in memory["searches"] if point["search"] == kind]
                axes.errorbar(
                    [point["recall_at_10"] for point in points],
                    [point["votings"][shown]["difference"] for point in points],
                    [2 * point["votings"][shown]["error"] for point in points],
                    color=colour,
                    marker=marker,
                    markersize=5,
                    capsize=2,
                    linewidth=1.2,
                    label=kind,
                )
            axes.axhline(0, color=grid, linewidth=1.5, zorder=0)
            axes.set_xlabel("recall@10")
            views = "one view" if memory["views"] == 1 else f"{memory['views']} views"
            axes.set_title(f"{memory['dimension']} dimensions, {views} of an image", loc="left", fontsize=10, color=ink)
            axes.legend(fontsize=8, loc="lower right", frameon=False, labelcolor=ink)
            coloured(figure, axes, theme)
        row[0][0].set_ylabel(f"accuracy less that of exact search, percent\n({shown}; bars: 2 standard errors)")
        save(figure, out / f"voting-recall-{theme}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True, help="what vectors.py has written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[256, 1280])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--rows", type=int, help="at most so many rows of each memory, for a trial")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document: dict = {"machine": measuring.machine(), "versions": measuring.versions(["faiss-cpu", "numpy"])}
    document |= {"threads": arguments.threads, "queries": arguments.queries, "memories": []}
    for dimension in arguments.dimensions:
        given = RealVectors.read(arguments.vectors, dimension)
        asked = given.wholes_Q[: arguments.queries]
        queries_QD = np.ascontiguousarray(given.base_ND[asked], np.float32)
        for views in (VIEWS, 1):
            began = time.perf_counter()
            rows = given.num_training * views // VIEWS
            rows = min(rows, arguments.rows or rows)
            truth = Truth.of(np.ascontiguousarray(given.base_ND[:rows]), queries_QD, max(COUNTS))
            found = compared(truth, given.base_labels_N[:rows], given.base_labels_N[asked])
            seconds = round(time.perf_counter() - began, 1)
            memory = {"dimension": dimension, "views": views, "rows": rows, "seconds": seconds, "searches": found}
            document["memories"].append(memory)
            (arguments.out / "voting_recall.json").write_text(json.dumps(document, indent=1))
    draw(document, arguments.out)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
