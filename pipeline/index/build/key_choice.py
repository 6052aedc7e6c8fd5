"""Chooses the key to build: candidates are built on a sample, tuned there to the target recall, and compared.

Among the candidates that reach the target within the allowed memory and latency, the one with the lowest cost is
chosen. The cost is the bytes held in memory, times the time they are held for a query. So a graph that answers twice as
fast from ten times the memory loses. Among candidates of similar cost, the one with the highest recall@100 is chosen.

If exact search takes a millisecond at most, it is chosen in any case.

Candidates are built from the smallest to the largest. Building stops when the remaining ones would have to be much
faster than any before.

On the sample, a candidate has so many inverted lists that each list is as long as in the whole. So a list costs the
same as in the whole. Times that grow with the number of rows are scaled: linearly for exact search, by the logarithm
for a graph.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.errors import IndexBuildError
from pipeline.index.build import tune
from pipeline.index.build.distinct import vector_keys
from pipeline.index.build.key_candidates import (
    FLAT,
    expected_bytes,
    least_rows,
    num_centroids,
    proposals,
    with_lists,
)
from pipeline.index.build.train import train_index, train_on
from pipeline.index.search.exact import ExactFinder
from pipeline.index.search.parameters import to_text, widest
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.log.records import Quality
from pipeline.store.storage.file_refs import FileRef, reading, unaltered_path
from pipeline.store.storage.interface import Storage, check_length
from pipeline.tabular import Tabular

SAMPLE_ROWS = 16_384
SAMPLE_QUERIES = 250
FEWEST_LISTS = 4

QUICK = 1e-3  # seconds of a query alone
ALIKE = 1.25  # times the least cost: timings vary by as much, so among such keys the finest codes are chosen
FASTER_AT_MOST = 3.0  # times the fastest so far: a larger candidate is never faster than this

CHOSEN = "chosen"
TOO_COARSE = "does not reach the recall"
TOO_LARGE = "takes more memory than allowed"
TOO_SLOW = "takes longer than allowed"
NEEDLESS = "not built: exact search is quick"


class Candidate(BaseModel):
    """A row of the table: a key, its measurements on the sample, and why it was chosen or not.

    `bytes_in_memory` is for all rows. `seconds_alone` and `seconds_in_batch` are per query, scaled to all rows.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    proposed_by: str
    built_as: str | None = None
    bytes_in_memory: int
    parameters: str | None = None
    quality: Quality | None = None
    build_seconds: float | None = None
    verdict: str = ""

    def reaches(self, target: float) -> bool:
        """Whether it has this recall@10 on the sample, and parameters were found for it."""
        return (
            self.quality is not None and not self.verdict.startswith(TOO_COARSE) and self.quality.recall_at_10 >= target
        )

    @property
    def cost(self) -> float:
        """Byte-seconds per query."""
        return self.bytes_in_memory * self.quality.seconds_in_batch if self.quality else math.inf


class Table(BaseModel, Tabular):
    """The candidates, and the requirements on them."""

    model_config = ConfigDict(frozen=True)

    rows: int
    sample_rows: int
    target_recall: float
    max_memory_bytes: int
    max_latency_ms: float
    refine: bool
    candidates: tuple[Candidate, ...]

    def _rows(self) -> list[dict[str, Any]]:
        """A row for each candidate."""
        return [candidate.model_dump(mode="json") for candidate in self.candidates]

    def to_json(self) -> dict:
        """The table as a JSON object."""
        return self.model_dump(mode="json")

    def without(self, key: str, quality: Quality) -> "Table":
        """The table with another candidate chosen, as this key has this quality on a shard and misses the target."""
        verdict = f"{TOO_COARSE}: {quality.recall_at_10:.3f} at most on a shard"
        left = [
            c.model_copy(
                update={"verdict": verdict if c.key == key else "" if c.reaches(self.target_recall) else c.verdict}
            )
            for c in self.candidates
        ]
        return self.model_copy(update={"candidates": _judged(left, self.max_latency_ms)})

    @property
    def chosen(self) -> Candidate:
        """The candidate to build. Raises IndexBuildError, with a way out, if there is none."""
        for candidate in self.candidates:
            if candidate.verdict == CHOSEN:
                return candidate
        fitting = [c for c in self.candidates if c.bytes_in_memory <= self.max_memory_bytes]
        if not fitting:
            least = min(self.candidates, key=lambda candidate: candidate.bytes_in_memory)
            raise IndexBuildError(
                f"no index of {self.rows:,} rows fits into {self.max_memory_bytes:,} bytes: "
                f"{least.key} takes least, {least.bytes_in_memory:,}; allow more with `max_memory_bytes`"
            )
        able = [c for c in self.candidates if c.quality and not c.verdict.startswith(TOO_COARSE)]
        if able:
            cheapest = min(able, key=lambda candidate: candidate.bytes_in_memory)
            assert cheapest.quality is not None  # noqa: S101  # candidates in `able` have a quality
            raise IndexBuildError(
                f"no index within {self.max_memory_bytes:,} bytes and {self.max_latency_ms:g} ms a query reaches "
                f"recall@10 {self.target_recall:g} on a sample: {cheapest.key} does with {cheapest.bytes_in_memory:,} "
                f"bytes and {cheapest.quality.seconds_alone * 1e3:.2f} ms; allow that with `max_memory_bytes` and "
                "`max_latency_ms`, or lower `target_recall`"
            )
        raise IndexBuildError(
            f"no index reaches recall@10 {self.target_recall:g} on a sample of {self.sample_rows:,} rows: lower "
            f"`target_recall`, {'' if self.refine else 'leave out `refine` none, '}or give `key` Flat for exact search"
        )


def read_table_of(storage: Storage, file: FileRef) -> Table:
    """The candidates stored with an index. Raises DamagedFile."""
    check_length(storage.uri, file.path, file.num_bytes)
    local = unaltered_path(storage, file)
    with reading(storage.uri, file.path):
        return Table.model_validate_json(local.read_bytes())


def choose(
    sample_ND: np.ndarray,
    num_rows: int,
    *,
    target_recall: float,
    max_memory_bytes: int,
    max_latency_ms: float,
    refine: bool = True,
    on_progress: OnProgress = ignore_progress,
) -> Table:
    """Build and measure candidates for `num_rows` rows on a sample of them (float16 [N, D]). See `chosen`."""
    sample_ND = np.ascontiguousarray(sample_ND[:SAMPLE_ROWS])
    keys_N = vector_keys(sample_ND)
    judge = tune.RecallEvaluator(sample_ND, tune.query_sample(keys_N, seed=0)[:SAMPLE_QUERIES], num_rows, keys_N)
    wanted = proposals(num_rows, sample_ND.shape[1], max_memory_bytes)
    sized = [
        Candidate(key=p.key, proposed_by=p.by, bytes_in_memory=expected_bytes(p.key, num_rows, sample_ND.shape[1]))
        for p in wanted
    ]
    measured: list[Candidate] = []
    exact = _exactly(next(c for c in sized if c.key == FLAT), sample_ND, num_rows)
    assert exact.quality is not None  # noqa: S101  # exact search always has a quality
    if exact.bytes_in_memory <= max_memory_bytes and exact.quality.seconds_alone <= min(QUICK, max_latency_ms / 1e3):
        measured = [exact, *(c.model_copy(update={"verdict": NEEDLESS}) for c in sized if c.key != FLAT)]
        sized = []
    for done, candidate in enumerate(sorted(sized, key=lambda candidate: candidate.bytes_in_memory)):
        on_progress(Progress("choosing", done, len(wanted)))
        hopeless = TOO_LARGE if candidate.bytes_in_memory > max_memory_bytes else _outdone(candidate, measured)
        if hopeless:
            measured.append(candidate.model_copy(update={"verdict": hopeless}))
        else:
            measured.append(_measured(candidate, judge, num_rows, target_recall, refine=refine))
    on_progress(Progress("choosing", len(wanted), len(wanted)))
    return Table(
        rows=num_rows,
        sample_rows=len(sample_ND),
        target_recall=target_recall,
        max_memory_bytes=max_memory_bytes,
        max_latency_ms=max_latency_ms,
        refine=refine,
        candidates=_judged(measured, max_latency_ms),
    )


def _outdone(candidate: Candidate, measured: Sequence[Candidate]) -> str:
    """Why a candidate need not be built: to win, it must be much faster than any before. "" if it can win."""
    able = [c for c in measured if c.quality is not None and not c.verdict]
    if not able:
        return ""
    fastest = min(c.quality.seconds_in_batch for c in able if c.quality)
    faster = candidate.bytes_in_memory * fastest / min(c.cost for c in able)
    if faster <= FASTER_AT_MOST:
        return ""
    return f"not built: it would have to be {faster:.0f} times as fast as the fastest"


def _measured(
    candidate: Candidate, judge: tune.RecallEvaluator, num_rows: int, target: float, *, refine: bool
) -> Candidate:
    """The candidate with its measurements on the sample, or with the reason if it cannot be built there."""
    vectors_ND = judge.vectors_ND
    grows = num_rows / len(vectors_ND)
    began = time.perf_counter()
    if candidate.key == FLAT:
        return _exactly(candidate, vectors_ND, num_rows)
    key = candidate.key
    if num_centroids(key):
        lists = max(round(num_centroids(key) / grows), min(FEWEST_LISTS, num_centroids(key)))
        key = with_lists(key, min(lists, num_centroids(key)))
    if len(vectors_ND) < least_rows(key):
        reason = f"needs {least_rows(key):,} rows to train on"
        return candidate.model_copy(update={"built_as": key, "verdict": reason})
    index = train_index(key, train_on(key, vectors_ND), roughly=True)
    index.add(np.ascontiguousarray(vectors_ND, np.float32))
    seconds = round(time.perf_counter() - began, 3)
    built = candidate.model_copy(update={"built_as": key, "build_seconds": seconds})
    values = tune.cheapest_parameters(index, judge, target, refined=refine)
    if values is None:
        values = widest(index) | ({"rerank": tune.RERANKS[-1]} if refine else {})
        quality = judge.quality(index, values, refined=refine)
        return built.model_copy(update={"quality": quality, "verdict": TOO_COARSE})
    quality = judge.quality(index, values, refined=refine)
    if isinstance(faiss.downcast_index(index), faiss.IndexHNSW):
        slower = math.log(num_rows) / math.log(len(vectors_ND))
        quality = quality.model_copy(
            update={
                "seconds_alone": quality.seconds_alone * slower,
                "seconds_in_batch": quality.seconds_in_batch * slower,
            }
        )
    return built.model_copy(update={"parameters": to_text(values), "quality": quality})


def _judged(candidates: Sequence[Candidate], max_latency_ms: float) -> tuple[Candidate, ...]:
    """The candidates with a verdict each, the best first."""
    able, others = [], []
    for candidate in candidates:
        if candidate.quality is None or candidate.verdict:
            others.append(candidate)
        elif candidate.quality.seconds_alone * 1e3 > max_latency_ms:
            others.append(candidate.model_copy(update={"verdict": TOO_SLOW}))
        else:
            able.append(candidate)
    able.sort(key=lambda candidate: candidate.cost)
    alike = [candidate for candidate in able if candidate.cost <= ALIKE * able[0].cost]
    chosen = max(alike, key=lambda candidate: candidate.quality.recall_at_100 if candidate.quality else 0, default=None)
    if chosen is not None:
        able.remove(chosen)
        others[:0] = [c.model_copy(update={"verdict": f"costs {c.cost / chosen.cost:.1f} times as much"}) for c in able]
        return (chosen.model_copy(update={"verdict": CHOSEN}), *others)
    return tuple(others)


def _exactly(candidate: Candidate, vectors_ND: np.ndarray, num_rows: int) -> Candidate:
    """The key Flat, measured on a sample and scaled to `num_rows` rows."""
    alone, together = _exact_seconds(vectors_ND)
    grows = num_rows / len(vectors_ND)
    quality = Quality.measured(1.0, 1.0, 1.0, alone * grows, together * grows)
    return candidate.model_copy(update={"built_as": FLAT, "parameters": "", "quality": quality, "build_seconds": 0.0})


def _exact_seconds(vectors_ND: np.ndarray) -> tuple[float, float]:
    """Seconds of an exact search: for a single query, and per query in a batch."""
    finder = ExactFinder(vectors_ND, np.arange(len(vectors_ND)))
    queries_QD = np.ascontiguousarray(vectors_ND[: tune.TIMED_QUERIES], np.float32)
    finder.find(queries_QD, tune.NEIGHBORS_TUNED)
    began = time.perf_counter()
    finder.find(queries_QD, tune.NEIGHBORS_TUNED)
    together = (time.perf_counter() - began) / len(queries_QD)
    alone = []
    for row in range(min(len(queries_QD), 20)):
        began = time.perf_counter()
        finder.find(queries_QD[row : row + 1], tune.NEIGHBORS_TUNED)
        alone.append(time.perf_counter() - began)
    return float(np.median(alone)), together
