"""An ingest from an object store that spoils some of its answers: are its rows those of an undisturbed one?

    python -m tests.end_to_end.spoiled_ingest [--images 20000] [--share 0.01] [--seed 0]

Real handwritten digits as PNG objects in SeaweedFS, where the memory lies too. Between it and the process that adds
stands a proxy, which answers that share of the requests with 503, cuts the answer off midway, or closes the connection
without one, though the store did what it was asked to. Prints one JSON document; exit status 1 if a row differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Literal

from cluster.rehearse import encoder_options, uploaded, write_source
from cluster.seaweed import SeaweedFS
from tests.end_to_end.killed_ingest import IMAGE_SIZE, ROOT, rows_of
from tests.store.proxy import Proxy

LONGEST_SECONDS = 1_200
SPOILED: dict[str, int | Literal["cut"] | None] = {"503": 503, "cut off": "cut", "none": None}


class Spoiler:
    """Spoils a share of the answers, and counts."""

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._generator = random.Random(seed)
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def judge(self, method: str, path: str, status: int) -> int | Literal["cut"] | None:
        with self._lock:
            self.counts["answers"] += 1
            if self._generator.random() >= self._share:
                return status
            how = self._generator.choice(list(SPOILED))
            self.counts[f"{method} {how}"] += 1
        return SPOILED[how]


def spoil(num_images: int, share: float, seed: int) -> dict:
    """Add the same source with and without the spoiler; what came of it."""
    with tempfile.TemporaryDirectory(prefix="vm-") as folder:
        (Path(folder) / "seaweed").mkdir()
        server = SeaweedFS(Path(folder) / "seaweed")
        before = dict(os.environ)
        try:
            os.environ.update(server.admin)
            source = uploaded(write_source(Path(folder) / "digits", num_images), server.uri())
            memories = server.uri(), server.uri()
            undisturbed, _ = _added(memories[0], source, server.endpoint)
            spoiler = Spoiler(share, seed)
            proxy = Proxy(server.endpoint, spoiler.judge)
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            report, seconds = _added(memories[1], source, proxy.endpoint)
            proxy.shutdown()
            same = rows_of(memories[0]).equals(rows_of(memories[1]))
        finally:
            os.environ.clear()
            os.environ.update(before)
            server.stop()
    return {
        "images": num_images,
        "same_rows": same,
        "entries": (undisturbed["entries"], report["entries"]),
        "rejected": (undisturbed["rejected"], report["rejected"]),
        "seconds": round(seconds, 1),
        **spoiler.counts,
    }


def _added(memory: str, source: str, endpoint: str) -> tuple[dict, float]:
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jobs.cli", "add", memory, source, "--json", *encoder_options()),
            *("--image-size", str(IMAGE_SIZE)),
        ],
        check=False,
        cwd=ROOT,
        env=os.environ | {"AWS_ENDPOINT_URL": endpoint},
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f"the add ended with status {done.returncode}:\n{done.stderr[-3_000:]}")
    return json.loads(done.stdout), time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = spoil(arguments.images, arguments.share, arguments.seed)
    print(json.dumps(result, indent=1))
    return 0 if result["same_rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
