"""What would be decided if an entry were not there, weighed less, or had another label? Nothing is changed.

python docs/examples/what_if.py my.memory new.jpg
"""

import sys

from visual_memory import Question, VisualMemory


def main(uri: str, image: str) -> None:
    memory = VisualMemory(uri)
    asked = Question(k=10)
    [decision] = memory.classify([image], question=asked)
    print("as it is", decision)

    nearest = decision.neighbors[0]
    for why, question in (
        ("without the nearest", Question(k=10, exclude=(nearest.id,))),
        ("with the nearest at a tenth of its weight", Question(k=10, weigh={nearest.id: 0.1})),
        ("if the nearest were an owl", Question(k=10, assume={nearest.id: "owl"})),
    ):
        [other] = memory.classify([image], question=question)
        print(why, other)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
