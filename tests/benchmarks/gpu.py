"""What a GPU gives: its matrix products, a model alone on data that is there, and the encoder from pixels in memory.

    python tests/benchmarks/gpu.py [--models NAME --models NAME] [--image-size 224] [--seconds 10]

Needs torch and timm; the encoder pydantic and safetensors too, and is left out where they lack. No Ray, no FAISS,
no weights: random ones are as fast. For each model, in float32, bfloat16 (autocast) and bfloat16 compiled, images/s of
  alone     the model on a batch that lies on the device;
  encoder   as an add has it: uint8 pixels in this process's memory to vectors in it, one batch begun ahead.
`flops share` is what the model alone makes of the rate of one large matrix product, measured in the same run.
Without a GPU it says so and measures the CPU, for a smoke test: --models vit_tiny_patch16_224 --image-size 32.
Prints one JSON document.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package need not be installed

MODELS = ("vit_small_patch14_dinov2", "vit_large_patch14_dinov2")
GPU_BATCH, CPU_BATCH = 256, 16  # as the encoder has them


def rate(work: Callable[[], object], amount: float, seconds: float, device: torch.device) -> float:
    """Amount of work in a second, after two rounds to warm up."""

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    work(), work()
    began, rounds = finished(), 0
    while (now := time.perf_counter()) - began < seconds or not rounds:
        for _ in range(1 if now - began < seconds / 20 else 4):
            work()
            rounds += 1
        finished()
    return rounds * amount / (finished() - began)


def matrix_products(device: torch.device, seconds: float) -> dict[str, float]:
    """Floating point operations a second of square products, in 10^12."""
    side = 8_192 if device.type == "cuda" else 512
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[name] = rate(lambda left=left, right=right: left @ right, 2 * side**3 / 1e12, seconds, device)
    return found


def figures(name: str, image_size: int, seconds: float, teraflops: dict[str, float], device: torch.device) -> dict:
    torch.manual_seed(0)
    sized = {"img_size": image_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    model = timm.create_model(name, pretrained=False, num_classes=0, **sized).eval().to(device)
    model = model.to(memory_format=torch.channels_last)
    batch = GPU_BATCH if device.type == "cuda" else CPU_BATCH
    inputs = torch.randn(batch, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(inputs[:1])
    flops = float(counter.get_total_flops())
    result: dict = {"batch": batch, "gigaflops an image": round(flops / 1e9, 2)}
    forward: dict[str, Callable] = {"float32": model, "bfloat16": model}
    began = time.perf_counter()
    try:
        forward["bfloat16, compiled"] = torch.compile(model, dynamic=False)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            forward["bfloat16, compiled"](inputs)
        result["seconds to compile"] = round(time.perf_counter() - began, 1)
    except Exception as error:
        forward.pop("bfloat16, compiled", None)
        result["not compiled"] = str(error).splitlines()[0]
    for way, function in forward.items():
        kind = way.partition(",")[0]
        autocast = torch.autocast(device.type, torch.bfloat16) if kind == "bfloat16" else nullcontext()
        with torch.inference_mode(), autocast:
            alone = rate(lambda function=function: function(inputs), batch, seconds, device)
        share = alone * flops / 1e12 / teraflops[kind]
        result[way] = {"alone, images/s": round(alone, 1), "flops share": round(share, 3)}
    try:
        encoders = encoders_of(model, name, image_size)
    except ModuleNotFoundError as error:
        return result | {"encoder": f"not measured: {error}"}
    pixels_BSS3 = np.random.default_rng(0).integers(0, 256, (batch, image_size, image_size, 3), dtype=np.uint8)
    for way in forward:
        encoded = from_memory(encoders[way](), pixels_BSS3, seconds)
        result[way]["encoder, images/s"] = round(encoded, 1)
        result[way]["encoder to alone"] = round(encoded / result[way]["alone, images/s"], 3)
    exact, fast = (encoders[way]().embed(pixels_BSS3).astype(np.float64) for way in ("float32", "bfloat16"))
    cosine = float(np.percentile((exact * fast).sum(axis=1), 1))
    return result | {"cosine of bfloat16 to float32 at the first percentile, random weights": round(cosine, 6)}


def encoders_of(model: torch.nn.Module, name: str, image_size: int) -> dict[str, Callable[[], Any]]:
    from pipeline.embeddings.encoder import Encoder
    from pipeline.embeddings.preprocessing import preprocessing_for
    from pipeline.store.tables.identity import Identity

    preprocessing = preprocessing_for(resolve_model_data_config(model), name, image_size)
    identity = Identity(
        encoder=name, weights_sha256="0" * 64, preprocessing=preprocessing, dimension=model.num_features
    )
    encoder = Encoder(model, identity)
    return {
        "float32": lambda: encoder,
        "bfloat16": encoder.in_bfloat16,
        "bfloat16, compiled": lambda: encoder.in_bfloat16().compiled(),
    }


def from_memory(encoder: Any, pixels_BSS3: np.ndarray, seconds: float) -> float:
    """Images/s as `embed_items` asks for them: a batch is begun before the last one's vectors are waited for."""
    waiting = [encoder.begin(pixels_BSS3)]

    def next_batch() -> None:
        waiting.append(encoder.begin(pixels_BSS3))
        waiting.pop(0)()

    return rate(next_batch, len(pixels_BSS3), seconds, encoder.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="append", help=f"timm models; default: {', '.join(MODELS)}")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    teraflops = matrix_products(device, min(arguments.seconds, 3.0))
    result = {
        "device": torch.cuda.get_device_name() if has_gpu else f"no GPU: the CPU, {platform.processor() or 'unnamed'}",
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "matrix products, 10^12 operations/s": {name: round(value, 2) for name, value in teraflops.items()},
        "models": {
            name: figures(name, arguments.image_size, arguments.seconds, teraflops, device)
            for name in arguments.models or MODELS
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
