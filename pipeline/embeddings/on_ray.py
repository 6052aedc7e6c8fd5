"""Parts embedded by a pool of Ray Data actors: the only wiring between the part embedder and Ray.

The Dataset has one row a part, never one an image, so that scheduling a billion images stays cheap. No pixels pass
through Ray's object store: an actor reads its part of the plan and writes its files itself.
"""

from collections.abc import Iterator, Sequence

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext

from pipeline import errors
from pipeline.embeddings.parts import PartEmbedder
from pipeline.errors import VisualMemoryError, WorkerError
from pipeline.store.places import open_storage
from pipeline.store.segments import PartMark, Reservation


class EmbedParts:
    """A Ray Data UDF: a batch is one row, the number of a part.

    The library's own errors travel as rows, since Ray would keep only their text, under a page of its own. For the same
    reason the encoder is loaded with the first part rather than in the constructor.
    """

    def __init__(self, memory_uri: str, reservation_json: str, num_cpus: int) -> None:
        self._memory_uri = memory_uri
        self._reservation = Reservation.model_validate_json(reservation_json)
        self._num_cpus = num_cpus
        self._embedder: PartEmbedder | None = None

    def __call__(self, batch: dict) -> dict:
        try:
            if self._embedder is None:
                node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
                storage = open_storage(self._memory_uri)
                self._embedder = PartEmbedder(storage, self._reservation, self._num_cpus, node=node)
            marks = [self._embedder.embed(int(part)).model_dump_json() for part in batch["part"]]
        except VisualMemoryError as error:
            return {"mark": [""], "failure": [type(error).__name__], "message": [str(error)]}
        return {"mark": marks, "failure": [""], "message": [""]}


def embed_on_ray(memory_uri: str, reservation: Reservation, parts: Sequence[int]) -> Iterator[PartMark]:
    """Embed parts on the Ray cluster this process is connected to, yielding marks as they come, in any order.

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
    marks = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        EmbedParts,
        fn_constructor_args=(memory_uri, reservation.model_dump_json(), cpus_each),
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
