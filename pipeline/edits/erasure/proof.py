"""Proves that entries are forgotten, and reports what was searched and what was found.

Every file of the memory is read again, decoded if its format is known, and searched for ids, uris, hashes, vectors and
values of kept columns (traces.py). The forgotten vectors are used as queries under every voting. The proof does not
rely on the erasure's own record of its work.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from pipeline.edits.erasure.all_versions import EntryFacts
from pipeline.edits.erasure.byte_search import quantizer_holds
from pipeline.edits.erasure.erase import ErasureReport
from pipeline.edits.erasure.receipt import Receipt
from pipeline.edits.erasure.redact import work_on_erased
from pipeline.edits.erasure.traces import THREADS, InFile, Traces
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.steps import PROCESS_BYTES, RunSteps, Step
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.leases import live_leases, read_leases

FILES_AHEAD = 1_024
FILES_A_STEP = 64
READ_BYTES = 512 << 20  # of row groups and the like that a step holds


def prove(
    log: VersionLog,
    state: State,
    erased: EntryFacts,
    asked: Mapping[str, Any],
    answers: Mapping[str, Any],
    report: ErasureReport | None,
    on_progress: OnProgress = ignore_progress,
    run_steps: RunSteps | None = None,
) -> Receipt:
    """Search every file for traces of the forgotten entries. Reads each file once, several at a time.

    With `run_steps` the files are read in steps, else in this process. RAM holds a row group of each file that is being
    read, or 8 MiB of it. Raises DamagedFile.

    `answers` is the result of querying their vectors (asking.ask_about_forgotten). `report` is None if nothing was
    erased.
    """
    files = log.storage.walk()
    traces = Traces(log, state, erased)
    looked_into = _in_threads(traces, sorted(files)) if run_steps is None else _in_steps(traces, files, run_steps)
    for done, found in enumerate(looked_into):
        on_progress(Progress("proving", done, len(files)))
        traces.add(found)
    on_progress(Progress("proving", len(files), len(files)))
    traces.leave_out_what_others_have()
    work = live_leases(
        log.storage, [record for record in read_leases(log.storage) if traces.any_held_by(record.covers)]
    )
    under_way = {*work_on_erased(log.storage, erased.uris), *map(str, work)}
    columns = zip(erased.ids_N.tolist(), erased.uris, erased.hashes, erased.labels, erased.datasets, strict=True)
    names = ("id", "uri", "sha256", "label", "dataset")
    return Receipt(
        memory=log.storage.uri,
        version=state.version,
        written_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        asked=asked,
        entries=[dict(zip(names, row, strict=True)) for row in columns],
        erased=report is not None,
        files_rewritten=report.rewritten if report else (),
        files_removed=len(report.removed) if report else 0,
        versions_redacted=report.redacted if report else 0,
        answers=answers,
        files_scanned=len(files),
        bytes_scanned=sum(files.values()),
        found=traces.found,
        live_duplicates=[*traces.duplicates.values()],
        quantizer=_quantizer(log, state, traces.own_vectors),
        noncurrent_versions=tuple(log.storage.noncurrent()),
        work_under_way=sorted(under_way),
    )


def _in_threads(traces: Traces, paths: Sequence[str]) -> Iterator[InFile]:
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(paths), FILES_AHEAD):
            yield from pool.map(traces.look_into, paths[start : start + FILES_AHEAD])


def _in_steps(traces: Traces, files: Mapping[str, int], run_steps: RunSteps) -> Iterator[InFile]:
    """Look into files in steps. A file that is not there where a step is done is looked for here again."""
    paths = sorted(files)
    steps = (
        Step(number, partial(traces.look_into_all, paths[start : start + FILES_A_STEP]), PROCESS_BYTES + READ_BYTES)
        for number, start in enumerate(range(0, len(paths), FILES_A_STEP))
    )
    for _, looked_into in run_steps(steps):
        for found in looked_into:
            yield traces.look_into(found.path) if found.gone else found


def _quantizer(log: VersionLog, state: State, own_vectors_ND: np.ndarray) -> dict[str, Any] | None:
    if state.index is None or state.index.trained is None:
        return None
    held = quantizer_holds(log.storage, state.index.trained, own_vectors_ND)
    return {
        "key": state.index.key,
        "path": state.index.trained.path,
        "holds_a_vector": held,
        "remains": "its centroids are averages over the vectors it was trained with, perhaps over these too; no vector "
        "stands in it as it was; `index --rebuild` trains one without them"
        if not held
        else "one of the vectors stands in it as a centroid: run `index --rebuild`",
    }
