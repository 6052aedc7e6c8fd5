"""Teach a class from a few images, ask, and unlearn it with a receipt.

    python docs/examples/teach_and_unlearn.py my.memory penguin new/1.jpg new/2.jpg new/3.jpg

The memory must have an encoder: make it with `visual-memory add my.memory photos/`.
"""

import sys

from visual_memory import VisualMemory


def main(uri: str, label: str, images: list[str]) -> None:
    memory = VisualMemory(uri)
    ids = memory.add_images(images, labels=[label] * len(images))  # one commit; counts from the next question on
    [decision] = memory.classify(images[:1], k=1)
    print(f"{images[0]} is a {decision.label} (confidence {decision.confidence:.2f})")

    report = memory.forget(ids=ids, erase=True, verify=True)  # from all files of all versions
    assert report.receipt is not None
    print(report.receipt.to_text())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
