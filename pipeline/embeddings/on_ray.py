"""Embeds parts with a pool of Ray Data actors. Only this module connects the part embedder with Ray.

The Dataset has one row per part, never one per image, so that scheduling a billion images stays cheap. An actor reads
its part of the plan and writes its files itself. Pixels pass through Ray's object store only if the nodes with GPUs
have too few CPU cores: then nodes without GPUs decode for them, one encoder batch per task.
"""

import json
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

# Ray Data restarts the work of a dead actor without limit. That is right for nodes that die. But a part whose image
# crashes a decoder ends its actor each time, and must end the add at last.
BEGINNINGS_OF_A_PART = 4

# Fewer cores cannot keep even a large model busy: a core decodes and resizes some 300 photographs of 500 x 375 pixels a
# second (docs/benchmarks.md), and one H100 embeds 2,500 with ViT-L/16 in bfloat16 (timm's benchmarks).
CORES_A_GPU = 8
DECODE_RETRIES = 3
LOOK_SECONDS = 2.0  # after waiting so long for a batch, check whether any node is left to decode it


@dataclass(frozen=True)
class Helpers:
    """The nodes without GPUs: their CPU cores per GPU of the cluster, and the ids of the nodes with GPUs."""

    cores_a_gpu: int
    gpu_nodes: tuple[str, ...]

    @classmethod
    def now(cls) -> "Helpers | None":
        """The helpers in the connected cluster; None if it has no node without GPUs to help, or no GPU."""
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        gpu_nodes = [node for node in nodes if node["Resources"].get("GPU", 0)]
        cores = sum(node["Resources"].get("CPU", 0) for node in nodes if node not in gpu_nodes)
        gpus = sum(node["Resources"]["GPU"] for node in gpu_nodes)
        if not cores or not gpus:
            return None
        return cls(max(int(cores // gpus), 1), tuple(node["NodeID"] for node in gpu_nodes))


class ClusterDecoding:
    """Decodes for an actor with a GPU: in its own threads, or on nodes without GPUs if its cores are too few.

    The cores are too few if there are fewer than CORES_A_GPU, or once decoding was the bottleneck of a part.
    """

    def __init__(self, num_cpus: int) -> None:
        self._here = Threads(num_cpus)
        self._starving = num_cpus < CORES_A_GPU
        self._task = _decode_task()

    def learn(self, stages: Stages) -> None:
        """Record whether decoding was the bottleneck of a part."""
        self._starving = self._starving or (stages.verdict() or ("",))[0] == "decoding"

    def batches(self, items: Iterable[Item], form: BatchForm) -> Generator[DecodedBatch]:
        """Decode batches. As many are ahead as the helping nodes decode at once for this actor, plus BATCHES_AHEAD."""
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
    # An inner function, so that Ray sends its code. A function of the module would make each decoding process import
    # torch, which takes seconds and hundreds of megabytes.
    def decode_batch(batch: list[Item], form: BatchForm) -> DecodedBatch | VisualMemoryError:
        """Decode a batch without its items, which the caller has. Return the library's errors: Ray would wrap them."""
        try:
            [decoded] = Threads(1).batches(batch, form)
        except VisualMemoryError as error:
            return error
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return replace(decoded, items=[], node=node)

    return ray.remote(decode_batch)


class Beginnings:
    """A Ray actor that counts how often each part was begun, also by actors that died."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def count(self, part: int) -> int:
        """Count one more start of a part; return the number of its starts."""
        self._counts[part] += 1
        return self._counts[part]


class EmbedParts:
    """A Ray Data UDF: a batch is one row, the number of a part.

    The library's own errors are returned as rows, because Ray would keep only their text, inside a long report of its
    own. For the same reason the first part loads the encoder, not the constructor.
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
            return {"mark": [""], "failure": [type(error).__name__], "arguments": [json.dumps(error.args)]}
        return {"mark": marks, "failure": [""], "arguments": [""]}

    def _done(self, worker: Worker, part: int) -> PartMark:
        if ray.get(self._beginnings.count.remote(part)) > BEGINNINGS_OF_A_PART:
            raise WorkerError(
                f"part {part} ended the process that worked on it {BEGINNINGS_OF_A_PART} times: "
                f"{worker.described(part)} may crash a decoder, or memory ran out; see to that and run the command "
                "again, which goes on where it was"
            )
        try:
            mark = worker.do(part)
        except ray.exceptions.RayError as error:  # a task that decoded for this part failed
            raise WorkerError(
                f"part {part} cannot be decoded ({_last_line(error)}): {worker.described(part)} may crash a decoder, "
                "or memory ran out; see to that and run the command again, which goes on where it was"
            ) from error
        if self._decoding is not None:
            self._decoding.learn(Stages(**mark.seconds))
        return mark


def do_parts_on_ray(work: Work, parts: Sequence[int]) -> Iterator[PartMark]:
    """Do parts on the Ray cluster that this process is connected to; yield marks as they come, in any order.

    There is one actor per GPU, with a fraction of its node's CPU cores. Without a GPU there is one actor per core,
    because batches small enough for the cache keep few threads busy. If an actor dies, by itself or with its node, Ray
    restarts it where resources are free and runs its parts again. Otherwise the parts wait until another actor is idle.
    Nodes that join get actors too.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_gpus = int(resources.get("GPU", 0)) if work.uses_gpu else 0
    num_actors = min(num_gpus or max(int(resources.get("CPU", 1)), 1), len(parts))
    DataContext.get_current().enable_progress_bars = False  # the caller draws the progress
    beginnings = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Beginnings).remote()
    marks = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        EmbedParts,
        fn_constructor_args=(work, beginnings),
        batch_size=1,
        # Start with the cluster's present size and grow when nodes join: a pool of fixed size would not use them.
        compute=ActorPoolStrategy(min_size=1, max_size=len(parts), initial_size=num_actors),
        num_cpus=_cpus_of_a_gpu() if num_gpus else 1,
        num_gpus=1 if num_gpus else None,
    )
    try:
        for row in marks.iter_rows():
            if row["failure"]:
                raise getattr(errors, row["failure"])(*json.loads(row["arguments"]))
            yield PartMark.model_validate_json(row["mark"])
    except ray.exceptions.RayError as error:  # an actor died, or raised an error that is not the library's own
        raise WorkerError(
            f"an actor that did parts failed ({_last_line(error)}): run the command again and it goes on where it was"
        ) from error


def _cpus_of_a_gpu() -> int:
    """CPU cores per GPU on the node with the fewest: every actor can get as many."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return min(int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0))


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
