"""Remember a folder of images with any timm model, from weights in a file, and measure how well it does.

python docs/examples/own_encoder.py my.memory photos/ resnet50.a1_in1k weights.safetensors held-out/
"""

import sys

from visual_memory import VisualMemory


def main(uri: str, photos: str, model: str, weights: str, held_out: str) -> None:
    memory = VisualMemory(uri)
    report = memory.add(photos, encoder=model, weights=weights, weights_order="positional", image_size=64)
    print(report)
    for reject in report.rejects:
        print(f"rejected {reject.uri}: {reject.reason}")

    evaluation = memory.evaluate(held_out, ks=(1, 5, 10), votings=("plurality", "rank"))
    print(evaluation.to_pandas().to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
