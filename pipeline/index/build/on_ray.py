"""The steps of a job as Ray tasks: one task per step, within the memory that it declares.

If a task dies with its node, Ray runs it again on another node. The task reads the marks, so a finished step is not
repeated.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import faiss
import ray
import ray.exceptions

from pipeline.errors import VisualMemoryError, WorkerError
from pipeline.foreign_errors import memory_ran_out, own_error
from pipeline.steps import Step

GPU_SHARE = 0.25  # of a GPU, for a step that uses one: the step spends most of its time elsewhere
TRIES = 3  # retries of a step whose process dies


def run_steps_on_ray(steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
    """Run steps on the connected cluster. Yields the number and the result of each step as it finishes, in any order.

    Raises WorkerError if the process of a step dies again after all retries, and OutOfMemory if memory ran out.
    """

    def run(owner: Any, make: Callable[..., Any]) -> Any:
        granted = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        faiss.omp_set_num_threads(max(int(granted.get("CPU", 1)), 1))
        try:
            return make() if owner is None else make(owner)
        except VisualMemoryError as error:  # returned as a value, because Ray would wrap it
            return error

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    room = resources.get("memory", float("inf"))
    gpu_share = GPU_SHARE if resources.get("GPU") else 0
    task = ray.remote(num_cpus=1, max_retries=TRIES)(run)
    shared = _Shared()
    running = {
        task.options(num_gpus=gpu_share * step.on_gpu, memory=min(step.memory_bytes, int(room))).remote(
            *shared.split(step.make)
        ): step.number
        for step in steps
    }
    try:
        while running:
            [ready], _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            result = ray.get(ready)
            if isinstance(result, VisualMemoryError):
                raise result
            yield number, result
    except ray.exceptions.RayError as error:
        if memory_ran_out(error):
            raise own_error(error, "work on Ray") or error from error
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise WorkerError(
            f"a process that did a step of the work failed ({last}): memory may have run out; run the command again"
        ) from error
    finally:
        for task_left in running:
            ray.cancel(task_left)


class _Shared:
    """Puts the object that many steps are methods of into Ray's store once, and not with each step."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Any]] = {}  # the object stays alive, so that its id is its own

    def split(self, make: Callable[[], Any]) -> tuple[Any, Callable[..., Any]]:
        """The object in the store and a call that takes it; None and `make` if it is no such method."""
        owner = getattr(make.func, "__self__", None) if isinstance(make, partial) else None
        if not isinstance(make, partial) or owner is None:
            return None, make
        if id(owner) not in self._known:
            self._known[id(owner)] = owner, ray.put(owner)
        return self._known[id(owner)][1], partial(_called, make.func.__name__, make.args, make.keywords)


def _called(name: str, arguments: tuple, named: dict[str, Any], owner: Any) -> Any:
    return getattr(owner, name)(*arguments, **named)
