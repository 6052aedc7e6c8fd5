"""Independent steps of a job, and a function that runs them one after the other in this process.

An index build, a compaction, an export, a copy, a check and an erasure have such steps; pipeline/runner.py has who runs
them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """A step on one shard or part. `make` can be pickled. `memory_bytes` is the most memory that it needs.

    `on_gpu` says whether a GPU, if there is one, makes it faster.
    """

    number: int
    make: Callable[[], Any]
    memory_bytes: int
    on_gpu: bool = False


PROCESS_BYTES = 400 << 20  # of a process with FAISS, pyarrow and this library loaded, on Linux

RunSteps = Callable[[Iterable[Step]], Iterator[tuple[int, Any]]]


def run_steps_here(steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
    """Yield the number of each step and what it returned, in order; each step has all cores."""
    return ((step.number, step.make()) for step in steps)
