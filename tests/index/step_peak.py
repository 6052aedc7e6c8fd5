"""One step on a shard in a process of its own, in which nothing else is imported, and the most memory it had."""

import re
from pathlib import Path
from typing import Any

import faiss

from pipeline.index.build.shard_steps import ShardWork


def measured(step: str, work: ShardWork, arguments: tuple, results: Any) -> None:
    """Put what a step returns, and the peak of resident bytes, into a queue."""
    faiss.omp_set_num_threads(1)  # as a task of one CPU does
    found = getattr(work, step)(*arguments)
    # Not ru_maxrss, which begins with what the process had that this one was forked from.
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    results.put((found, int(kilobytes) << 10))
