"""`add` beside clip-retrieval's inference: the same photographs, the same architecture, one after the other.

    python -m venv PEER && PEER/bin/pip install clip-retrieval
    python -m tests.benchmarks.clip_retrieval --images photos --peer PEER/bin/python [--count 1200]

ViT-B/32 of CLIP with random weights, for the hub is not needed to measure speed: open_clip's there, timm's
`vit_base_patch32_clip_224` here (the same but for the last projection to 512 dimensions), both in float32 on the CPU.
Each runs as its command in a process of its own, as a user would start it; the seconds hold the start. The peer runs
with its own defaults (batches of 256, four processes that decode) but for its text tower, which is switched off. Files
are taken again where there are fewer than `count`. Prints one JSON document.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch

PEER_MODEL = "ViT-B-32"
OUR_MODEL = "vit_base_patch32_clip_224"
SAVE_PEER = "import open_clip, torch, sys; torch.save(open_clip.create_model(sys.argv[1]).state_dict(), sys.argv[2])"
RUN_PEER = "from clip_retrieval.cli import main; main()"


def seconds_of(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident bytes of a command and its children."""
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            sys.exit(said.read().decode(errors="replace")[-3_000:])
        return time.perf_counter() - began, usage.ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--peer", required=True, help="a Python that has clip-retrieval")
    parser.add_argument("--count", type=int, default=1_200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        found = itertools.cycle(sorted(path for path in arguments.images.rglob("*.*") if path.is_file()))
        for number, path in enumerate(itertools.islice(found, arguments.count)):
            shutil.copy(path, folder / "images" / f"{number:06d}{path.suffix}")
        subprocess.run([arguments.peer, "-c", SAVE_PEER, PEER_MODEL, str(folder / "peer.pt")], check=True)
        torch.manual_seed(0)
        torch.save(timm.create_model(OUR_MODEL, num_classes=0).state_dict(), folder / "ours.pt")
        peer = [arguments.peer, "-c", RUN_PEER, "inference", "--input_dataset", str(folder / "images")]
        peer += ["--output_folder", str(folder / "embeddings"), "--enable_text", "False"]
        peer += ["--clip_model", f"open_clip:{PEER_MODEL}/{folder / 'peer.pt'}", "--use_jit", "False"]
        ours = [sys.executable, "-m", "jobs.cli", "add", str(folder / "memory"), str(folder / "images")]
        ours += ["--encoder", OUR_MODEL, "--weights", str(folder / "ours.pt")]
        result: dict = {"images": arguments.count}
        for name, command in (("clip-retrieval", peer), ("add", ours)):
            seconds, peak = seconds_of(command)
            rate = round(arguments.count / seconds, 1)
            result[name] = {"seconds": round(seconds, 1), "images_per_second": rate, "peak_bytes": peak}
            print(name, result[name], file=sys.stderr, flush=True)
        result["ratio"] = round(result["clip-retrieval"]["seconds"] / result["add"]["seconds"], 2)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
