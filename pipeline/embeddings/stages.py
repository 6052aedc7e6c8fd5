"""The seconds that each stage of an embedding run takes, and advice on how to make the run faster."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

BUSY = 0.75  # fraction of a worker's time in the model, above which other stages can win little


@dataclass
class Stages:
    """Seconds of a worker by stage.

    `reading` and `decoding` are sums over all its threads, which run while the model computes. The main thread spends
    its time in `model`, in `writing`, and in `waiting` for images that are not decoded yet.
    """

    reading: float = 0.0
    decoding: float = 0.0
    waiting: float = 0.0
    model: float = 0.0
    writing: float = 0.0

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of another part, stage by stage."""
        for name, value in seconds.items():
            setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, float]:
        """Seconds by stage, rounded to milliseconds."""
        return {name: round(value, 3) for name, value in dataclasses.asdict(self).items()}

    def verdict(self) -> tuple[str, str] | None:
        """The bottleneck of the run (device, decoding or storage) and the best remedy; None if no time was spent."""
        total = self.waiting + self.model + self.writing
        if not total:
            return None
        share = self.model / total
        if share >= BUSY:
            return "device", f"the model took {share:.0%} of the time: give it a GPU, more of them, or a smaller model"
        if self.writing > self.waiting:
            return "storage", f"writing took {self.writing / total:.0%} of the time: keep the memory nearer"
        waited = f"the model waited {self.waiting / total:.0%} of the time for images"
        if self.decoding >= self.reading:
            return "decoding", f"{waited} to be decoded: give each worker more CPU cores, or smaller images"
        return "storage", f"{waited} to be read: run nearer to them, on more nodes, or put them into tar archives"
