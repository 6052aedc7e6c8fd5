"""Peak memory of an add, whatever the number of images: `visual-memory add` in a process of its own for each number.

    python -m tests.benchmarks.memory [--counts 1000 10000 100000] [--image-size 64]

Real handwritten digits as PNG files. `peak_bytes` is the largest resident set of the process, `loaded_bytes` that of
one that has loaded the same encoder and embedded one image. Prints one JSON document.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.rehearse import encoder_options, write_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--image-size", type=int, default=64)
    arguments = parser.parse_args()
    result: dict = {"image_size": arguments.image_size, "adds": []}
    with tempfile.TemporaryDirectory() as folder:
        for count in [1, *arguments.counts]:
            source = write_source(Path(folder) / f"images-{count}", max(count, 7))
            if count == 1:
                source = sorted(source.rglob("*.png"))[-1]
            command = [sys.executable, "-m", "jobs.cli", "add", f"{folder}/memory-{count}", str(source), "--json"]
            with open(f"{folder}/{count}.json", "wb") as out:
                process = subprocess.Popen(
                    [*command, *encoder_options(), "--image-size", str(arguments.image_size)], stdout=out
                )
                _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"the add of {count} images failed with status {status}")
            if count == 1:
                result["loaded_bytes"] = usage.ru_maxrss << 10
                continue
            report = json.loads(Path(f"{folder}/{count}.json").read_text())
            about = {"images": count, "peak_bytes": usage.ru_maxrss << 10, "version": report["version"]}
            result["adds"].append(about | {"images_per_second": report["images_per_second"]})
            print(result["adds"][-1], file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
