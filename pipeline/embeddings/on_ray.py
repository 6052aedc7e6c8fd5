"""Parts embedded by a pool of Ray Data actors: the only wiring between the part embedder and Ray.

The Dataset has one row a part, never one an image, so that scheduling a billion images stays cheap. An actor reads its
part of the plan and writes its files itself. Pixels pass through Ray's object store only where the nodes with GPUs have
too few CPU cores: then nodes without GPUs decode for them, a batch of the encoder a task.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext

from pipeline import errors
from pipeline.embeddings.decoding import BATCHES_AHEAD, BatchForm, DecodedBatch, Threads, begin_ahead
from pipeline.embeddings.parts import Work, Worker
from pipeline.embeddings.stages import Stages
from pipeline.errors import VisualMemoryError, WorkerError
from pipeline.images.containers.items import Item
from pipeline.store.segments.part_marks import PartMark

# Ray Data begins the work of an actor that died again without end. That is right for nodes that die, but a part that
# takes its actor down each time, with an image that crashes a decoder, must end the add some day.
BEGINNINGS_OF_A_PART = 4

# Fewer cannot keep even a large model busy: a core decodes and resizes some 300 photographs of 500 x 375 pixels a
# second (docs/benchmarks.md), and one H100 embeds 2,500 with ViT-L/16 in bfloat16 (timm's benchmarks).
CORES_A_GPU = 8
DECODE_RETRIES = 3
LOOK_SECONDS = 2.0  # of waiting for a batch, after which to see whether any node is left to decode it


@dataclass(frozen=True)
class Helpers:
    """The nodes without GPUs: what they have for each GPU, and the ids of the others."""

    cores_a_gpu: int
    gpu_nodes: tuple[str, ...]

    @classmethod
    def now(cls) -> "Helpers | None":
        """Those of the cluster this process is connected to; None where there are none."""
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        gpu_nodes = [node for node in nodes if node["Resources"].get("GPU", 0)]
        cores = sum(node["Resources"].get("CPU", 0) for node in nodes if node not in gpu_nodes)
        gpus = sum(node["Resources"]["GPU"] for node in gpu_nodes)
        if not cores or not gpus:
            return None
        return cls(max(int(cores // gpus), 1), tuple(node["NodeID"] for node in gpu_nodes))


class ClusterDecoding:
    """Decoding for an actor with a GPU: by its own threads, or by nodes without GPUs where its cores are too few.

    They are too few when they are fewer than CORES_A_GPU, or once a part waited for decoding.
    """

    def __init__(self, num_cpus: int) -> None:
        self._here = Threads(num_cpus)
        self._starving = num_cpus < CORES_A_GPU
        self._task = _decode_task()

    def learn(self, stages: Stages) -> None:
        """Take note of where the time of a part went."""
        self._starving = self._starving or (stages.verdict() or ("",))[0] == "decoding"

    def batches(self, items: Iterable[Item], form: BatchForm) -> Generator[DecodedBatch]:
        """Decoded batches, as many ahead as the nodes that help decode at once for this actor."""
        helpers = Helpers.now() if self._starving else None
        if helpers is None:
            yield from self._here.batches(items, form)
            return
        away = {"ray.io/node-id": f"!in({','.join(helpers.gpu_nodes)})"}
        task = self._task.options(num_cpus=1, max_retries=DECODE_RETRIES, label_selector=away)
        begun = begin_ahead(
            items, form.batch_size, lambda batch: task.remote(batch, form), helpers.cores_a_gpu + BATCHES_AHEAD
        )
        with closing(begun):
            for batch, asked, took in begun:
                found = self._answer(asked, batch, form)
                yield replace(found, items=batch, reading=found.reading + took)

    def _answer(self, asked: Any, batch: list[Item], form: BatchForm) -> DecodedBatch:
        while not ray.wait([asked], timeout=LOOK_SECONDS)[0]:
            if Helpers.now() is None:
                ray.cancel(asked)
                [found] = self._here.batches(batch, form)
                return found
        answer = ray.get(asked)
        if isinstance(answer, VisualMemoryError):
            raise answer
        return answer  # type: ignore[no-any-return]


def _decode_task() -> Any:
    # Within a function, so that Ray sends its code: a function of this module would make each process that decodes
    # import torch, which takes seconds and hundreds of megabytes.
    def decode_batch(batch: list[Item], form: BatchForm) -> DecodedBatch | VisualMemoryError:
        """The batch, without the items that the caller has; the library's own errors as values, Ray would wrap them."""
        try:
            [decoded] = Threads(1).batches(batch, form)
        except VisualMemoryError as error:
            return error
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return replace(decoded, items=[], node=node)

    return ray.remote(decode_batch)


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

    def __init__(self, work: Work, beginnings: Any) -> None:
        self._work = work
        self._beginnings = beginnings
        self._worker: Worker | None = None
        granted = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        self._num_cpus = max(int(granted.get("CPU", 1)), 1)
        self._decoding = ClusterDecoding(self._num_cpus) if granted.get("GPU") else None

    def __call__(self, batch: dict) -> dict:
        try:
            if self._worker is None:
                node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
                self._worker = self._work.open(self._num_cpus, node, decoding=self._decoding)
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
        try:
            mark = worker.do(part)
        except ray.exceptions.RayError as error:  # of a task that decoded for it
            raise WorkerError(
                f"part {part} cannot be decoded ({_last_line(error)}): {worker.described(part)} may crash a decoder, "
                "or memory ran out; see to that and run the command again, which goes on where it was"
            ) from error
        if self._decoding is not None:
            self._decoding.learn(Stages(**mark.seconds))
        return mark


def do_parts_on_ray(work: Work, parts: Sequence[int]) -> Iterator[PartMark]:
    """Do parts on the Ray cluster this process is connected to, yielding marks as they come, in any order.

    One actor a GPU with a share of its node's CPU cores, or one a core where there is no GPU: batches small enough for
    the cache keep few threads busy.
    An actor that dies, by itself or with its node, is restarted by Ray where there is room, and its parts are run
    again; where there is none they wait until another actor has nothing left to do. Nodes that join get actors too.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_gpus = int(resources.get("GPU", 0))
    num_actors = min(num_gpus or max(int(resources.get("CPU", 1)), 1), len(parts))
    DataContext.get_current().enable_progress_bars = False  # progress is the caller's to draw
    beginnings = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Beginnings).remote()
    marks = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        EmbedParts,
        fn_constructor_args=(work, beginnings),
        batch_size=1,
        # What the cluster has now, and more when nodes join: a pool of fixed size would not use them.
        compute=ActorPoolStrategy(min_size=1, max_size=len(parts), initial_size=num_actors),
        num_cpus=_cpus_of_a_gpu() if num_gpus else 1,
        num_gpus=1 if num_gpus else None,
    )
    try:
        for row in marks.iter_rows():
            if row["failure"]:
                raise getattr(errors, row["failure"])(row["message"])
            yield PartMark.model_validate_json(row["mark"])
    except ray.exceptions.RayError as error:  # an actor died, or raised what the library does not know
        raise WorkerError(
            f"an embedding actor failed ({_last_line(error)}): run the command again and it goes on where it was"
        ) from error


def _cpus_of_a_gpu() -> int:
    """CPU cores for each GPU on the node that has fewest for it: what every actor can be given."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return min(int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0))


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
