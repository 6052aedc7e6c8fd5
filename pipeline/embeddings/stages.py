"""Where the time of an embedding run goes, and what would make it faster."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

BUSY = 0.75  # of a worker's time in the model: there is little left to win elsewhere


@dataclass
class Stages:
    """Seconds of a worker. `reading` and `decoding` are those of all its threads, which go on while the model works.

    What a worker itself does is `model`, `writing`, and `waiting` for images that are not decoded yet.
    """

    reading: float = 0.0
    decoding: float = 0.0
    waiting: float = 0.0
    model: float = 0.0
    writing: float = 0.0

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what another part took, stage by stage."""
        for name, value in seconds.items():
            setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, float]:
        """Seconds by stage, rounded to milliseconds."""
        return {name: round(value, 3) for name, value in dataclasses.asdict(self).items()}

    def verdict(self) -> tuple[str, str] | None:
        """What bounds the run (device, decoding or storage) and the one thing that helps most; None for no run."""
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
