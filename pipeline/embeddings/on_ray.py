"""Parts embedded by a pool of Ray Data actors: the only wiring between the part embedder and Ray.

The Dataset has one row a part, never one an image, so that scheduling a billion images stays cheap. No pixels pass
through Ray's object store: an actor reads its part of the plan and writes its files itself.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext

from pipeline import errors
from pipeline.embeddings.parts import Work, Worker
from pipeline.errors import VisualMemoryError, WorkerError
from pipeline.store.segments import PartMark

# Ray Data begins the work of an actor that died again without end. That is right for nodes that die, but a part that
# takes its actor down each time, with an image that crashes a decoder, must end the add some day.
BEGINNINGS_OF_A_PART = 4


class Beginnings:
    """A Ray actor that counts how often each part was begun, in actors that may not have lived to tell."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def count(self, part: int) -> int:
        """Note that a part is begun, for which time."""
        self._counts[part] += 1
        return self._counts[part]


class EmbedParts:
    """A Ray Data UDF: a batch is one row, the number of a part.

    The library's own errors travel as rows, since Ray would keep only their text, under a page of its own. For the same
    reason the encoder is loaded with the first part rather than in the constructor.
    """

    def __init__(self, work: Work, num_cpus: int, beginnings: Any) -> None:
        self._work = work
        self._num_cpus = num_cpus
        self._beginnings = beginnings
        self._worker: Worker | None = None

    def __call__(self, batch: dict) -> dict:
        try:
            if self._worker is None:
                node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
                self._worker = self._work.open(self._num_cpus, node)
            marks = [self._done(self._worker, int(part)).model_dump_json() for part in batch["part"]]
        except VisualMemoryError as error:
            return {"mark": [""], "failure": [type(error).__name__], "message": [str(error)]}
        return {"mark": marks, "failure": [""], "message": [""]}

    def _done(self, worker: Worker, part: int) -> PartMark:
        if ray.get(self._beginnings.count.remote(part)) > BEGINNINGS_OF_A_PART:
            raise WorkerError(
                f"part {part} ended the process that worked on it {BEGINNINGS_OF_A_PART} times: "
                f"{worker.described(part)} may crash a decoder, or memory ran out; see to that and run the command "
                "again, which goes on where it was"
            )
        return worker.do(part)


def work_on_ray(work: Work, parts: Sequence[int]) -> Iterator[PartMark]:
    """Do parts on the Ray cluster this process is connected to, yielding marks as they come, in any order.

    One actor a GPU, or one a CPU core where there is no GPU: batches small enough for the cache keep few threads busy.
    An actor that dies, by itself or with its node, is restarted by Ray where there is room, and its parts are run
    again; where there is none they wait until another actor has nothing left to do. Nodes that join get actors too.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_gpus = int(resources.get("GPU", 0))
    num_cores = max(int(resources.get("CPU", 1)), 1)
    num_actors = min(num_gpus or num_cores, len(parts))
    cpus_each = max(num_cores // num_actors, 1) if num_gpus else 1
    DataContext.get_current().enable_progress_bars = False  # progress is the caller's to draw
    beginnings = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Beginnings).remote()
    marks = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        EmbedParts,
        fn_constructor_args=(work, cpus_each, beginnings),
        batch_size=1,
        # What the cluster has now, and more when nodes join: a pool of fixed size would not use them.
        compute=ActorPoolStrategy(min_size=1, max_size=len(parts), initial_size=num_actors),
        num_cpus=cpus_each,
        num_gpus=1 if num_gpus else None,
    )
    try:
        for row in marks.iter_rows():
            if row["failure"]:
                raise getattr(errors, row["failure"])(row["message"])
            yield PartMark.model_validate_json(row["mark"])
    except ray.exceptions.RayError as error:  # an actor died, or raised what the library does not know
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise WorkerError(
            f"an embedding actor failed ({reason}): run the command again and it goes on where it was"
        ) from error
