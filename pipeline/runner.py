"""Where the work on many parts or shards is done: in this process, or on the Ray cluster it is connected to."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from pipeline.errors import UsageError
from pipeline.extras import needed_for
from pipeline.index.build.steps import Step, run_steps_here

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder
    from pipeline.embeddings.parts import Work
    from pipeline.store.segments.part_marks import PartMark

RunnerName = Literal["here", "ray"]


class Runner(Protocol):
    """Does parts with an encoder, and steps without one. Results come in any order."""

    def do_parts(self, work: "Work", parts: Sequence[int], encoder: "Encoder | None") -> "Iterable[PartMark]":
        """Embed parts, or decide about them, yielding their marks; `encoder` is loaded already, or None."""

    def run_steps(self, steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
        """Run independent steps, yielding the number of each and what it returned."""


class Here:
    """In this process, one after the other, each with all its cores."""

    def do_parts(self, work: "Work", parts: Sequence[int], encoder: "Encoder | None") -> "Iterable[PartMark]":
        """As Runner says."""
        from pipeline.embeddings.parts import do_parts_here

        return do_parts_here(work, parts, encoder)

    def run_steps(self, steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
        """As Runner says."""
        return run_steps_here(steps)


class OnRay:
    """On the Ray cluster this process is connected to, many at once. Ray is imported only here."""

    def do_parts(self, work: "Work", parts: Sequence[int], encoder: "Encoder | None") -> "Iterable[PartMark]":  # noqa: ARG002
        """As Runner says; each actor loads the encoder itself."""
        with needed_for("work on Ray"):
            from pipeline.embeddings.on_ray import do_parts_on_ray

        return do_parts_on_ray(work, parts) if parts else ()

    def run_steps(self, steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
        """As Runner says."""
        with needed_for("work on Ray"):
            from pipeline.index.build.on_ray import run_steps_on_ray

        return run_steps_on_ray(steps)


def runner_of(name: RunnerName) -> Runner:
    """The runner of that name. Raises UsageError."""
    if name not in get_args(RunnerName):
        raise UsageError(f"runner {name} is unknown: give here or ray")
    return OnRay() if name == "ray" else Here()
