"""The steps of an index build as Ray tasks: each shard on its own, within the memory it declares.

A task that dies with its node is run again elsewhere; it goes by the marks, so that a step that was done stays done.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import faiss
import ray
import ray.exceptions

from pipeline.errors import VisualMemoryError, WorkerError
from pipeline.index.build.shard_steps import Gathered, Measured, Populated, ShardWork
from pipeline.store.storage.file_refs import FileRef

GPU_SHARE = 0.25  # of a GPU, for a task that populates a shard where the cluster has any: most of its time is not there
TRIES = 3  # of a step whose process dies, beyond the first


class OnRay:
    """Workers on the Ray cluster this process is connected to."""

    def gathered(self, work: ShardWork, numbers: Sequence[int]) -> Iterable[tuple[int, Gathered]]:
        """As `build.Workers` says."""
        return _done((number, work.memory_bytes(number), partial(work.gather, number)) for number in numbers)

    def populated(
        self, work: ShardWork, trained: FileRef, shards: Sequence[tuple[int, Gathered]]
    ) -> Iterable[tuple[int, Populated]]:
        """As `build.Workers` says."""
        steps = [
            (
                number,
                _needs(work, number, trained.num_bytes),
                partial(work.populate, number, found.side, trained),
            )
            for number, found in shards
        ]
        return _done(steps, gpu_share=GPU_SHARE if ray.cluster_resources().get("GPU") else 0)  # type: ignore[no-untyped-call]

    def measured(
        self, work: ShardWork, known: str | None, shards: Sequence[tuple[int, Gathered, Populated]]
    ) -> Iterable[tuple[int, Measured]]:
        """As `build.Workers` says."""
        return _done(
            (
                number,
                work.memory_bytes(number, filled.index.num_bytes),
                partial(work.measure, number, found.side, filled.index, known),
            )
            for number, found, filled in shards
        )


def _needs(work: ShardWork, number: int, trained_bytes: int) -> int:
    """Memory to populate a shard: codes are no larger than the vectors in float32."""
    rows = sum(file.rows for file in work.shards[number])
    return work.memory_bytes(number, trained_bytes + rows * 2 * work.dimension)


def _done(steps: Iterable[tuple[int, int, Callable[[], Any]]], gpu_share: float = 0) -> Iterator[tuple[int, Any]]:
    """Run steps, each of a shard's number and the bytes it needs, yielding what they return as it comes."""

    def step(make: Callable[[], Any]) -> Any:
        granted = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        faiss.omp_set_num_threads(max(int(granted.get("CPU", 1)), 1))
        try:
            return make()
        except VisualMemoryError as error:  # as a value: Ray would wrap it
            return error

    room = ray.cluster_resources().get("memory", float("inf"))  # type: ignore[no-untyped-call]
    task = ray.remote(num_cpus=1, max_retries=TRIES)(step)
    running = {
        task.options(num_gpus=gpu_share, memory=min(needed, int(room))).remote(make): number
        for number, needed, make in steps
    }
    try:
        while running:
            [ready], _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            found = ray.get(ready)
            if isinstance(found, VisualMemoryError):
                raise found
            yield number, found
    except ray.exceptions.RayError as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise WorkerError(
            f"a process that built a shard failed ({last}): memory may have run out; run the command again and it goes "
            "on where it was"
        ) from error
    finally:
        for task_left in running:
            ray.cancel(task_left)
