"""What an index of a memory costs as it grows, and by which power of its rows.

    python -m tests.benchmarks.index_growth --vectors FOLDER --out FOLDER --rows 100000 1000000 [--key KEY]

Base and queries are grown from real vectors (`vectors.grown`), the queries from those of test images only. At each size
a memory of given vectors is added, indexed and searched as in `index_peers`, in processes of its own, and removed.
An exponent is the slope of a figure's logarithm over that of the rows, by least squares: 1 is linear, 0.5 a root.
`single_ms` and `batch_per_second` are those of the least effort with recall@10 of 0.95. Each size but the first was
predicted on the memory of the size before it, by `plan-capacity`: `off_by` is that over what was measured. Prints one
JSON document.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.benchmarks import measuring
from tests.benchmarks.index_contenders import K
from tests.benchmarks.index_peers import DEFAULT_BYTES, ROOT, Run, good_effort
from tests.benchmarks.vectors import RealVectors, grown

FIGURES = ("store_seconds", "seconds", "peak_bytes", "disk_bytes", "searched_bytes", "index_bytes")


def exponents(sizes: Sequence[Mapping]) -> dict[str, float]:
    """The slope of every figure that each size has, and that is more than nothing."""
    slopes = {}
    rows = np.log([size["rows"] for size in sizes])
    for name in sizes[0]["figures"] if len(sizes) > 1 else ():
        values = [size["figures"].get(name, 0) for size in sizes]
        if min(values) > 0:
            slopes[name] = round(float(np.polyfit(rows, np.log(values), 1)[0]), 3)
    return slopes


def figures(result: Mapping) -> dict[str, float]:
    """What is compared between sizes."""
    build = result["build"]
    effort = good_effort(result["points"])
    point = next(point for point in result["points"] if point["effort"] == effort)
    return (
        {name: build[name] for name in FIGURES}
        | {f"{stage}_seconds": seconds for stage, seconds in build["stage_seconds"].items()}
        | {"resident_bytes": result["memory"]["resident_bytes"], "open_seconds": result["open_seconds"]}
        | {name: point[name] for name in ("recall_at_10", "batch_per_second", "single_ms", "single_p99_ms")}
    )


def predicted(memory: Path, rows: int, max_bytes: int) -> dict[str, float]:
    """What `plan-capacity` says of an index over so many rows."""
    command = [sys.executable, "-W", "ignore", "-m", "jobs.cli", "plan-capacity", str(memory), "--rows", str(rows)]
    asked = [*command, "--memory-per-node", str(max_bytes), "--json"]
    said = subprocess.run(asked, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(said.stdout))


def off_by(plan: Mapping, build: Mapping) -> dict[str, float]:
    """What was predicted of a build, as a multiple of what was measured."""
    pairs = {
        "seconds": (plan["total_build_seconds"], build["seconds"]),
        "peak_bytes": (plan["build_peak_bytes"], build["peak_bytes"] + build["loaded_bytes"]),
        "bytes_in_memory": (plan["bytes_in_memory"], build["index_bytes"]),
        "bytes_on_disk": (plan["bytes_on_disk"], build["searched_bytes"]),
    }
    return {name: round(said / measured, 3) for name, (said, measured) in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True, help="what vectors.py has written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--key", help="default: what the memory chooses at each size")
    parser.add_argument("--max-memory", type=int, default=DEFAULT_BYTES)
    parser.add_argument("--limit", type=float, default=7_200, help="seconds a step may take")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    given = RealVectors.read(arguments.vectors, arguments.dimension)
    queries_QD = grown(given.queries_QD, arguments.queries, seed=1).astype(np.float32)
    document: dict = {"machine": measuring.machine(), "dimension": arguments.dimension, "k": K}
    document |= {"threads": arguments.threads, "queries": arguments.queries, "sizes": []}
    sizes = sorted(arguments.rows)
    plan: dict = {}
    for rows, following in zip(sizes, [*sizes[1:], None], strict=True):
        run = Run(out / f"rows-{rows}", arguments.threads, arguments.limit, sys.executable)
        run.prepare(grown(given.base_ND, rows, seed=2), queries_QD)
        settings = replace(run.settings("ours", arguments.max_memory), key=arguments.key)
        result = run.measured("ours", settings, cold=False)
        if "points" not in result:
            sys.exit(f"{rows:,} rows: {result.get('failed', result.get('skipped'))}")
        size = {"rows": rows, "figures": figures(result), **result}
        document["sizes"].append(size | {"predicted": plan, "off_by": off_by(plan, result["build"])} if plan else size)
        if following is not None:
            plan = predicted(Path(settings.folder) / "memory", following, arguments.max_memory)
        shutil.rmtree(run.work)
        document["exponents"] = exponents(document["sizes"])
        (out / "index_growth.json").write_text(json.dumps(document, indent=1))
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
