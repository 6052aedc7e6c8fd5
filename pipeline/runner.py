"""Runs the work on many parts or shards in this process, or on the Ray cluster that this process is connected to."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from pipeline.errors import UsageError
from pipeline.extras import needed_for
from pipeline.steps import Step, run_steps_here

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder
    from pipeline.embeddings.parts import Work
    from pipeline.store.segments.part_marks import PartMark

RunnerName = Literal["here", "ray"]


class Runner(Protocol):
    """Does parts with an encoder, and runs steps without one. Results come in any order."""

    def do_parts(self, work: "Work", parts: Sequence[int], encoder: "Encoder | None") -> "Iterable[PartMark]":
        """Embed parts, or decide about them, and yield their marks.

        `encoder` is already loaded. It may be None; then the encoder is loaded when needed.
        """

    def run_steps(self, steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
        """Run independent steps, and yield the number and the result of each."""


class Here:
    """Runs parts and steps in this process, one after another; each uses all cores of the process."""

    def do_parts(self, work: "Work", parts: Sequence[int], encoder: "Encoder | None") -> "Iterable[PartMark]":
        """See Runner."""
        from pipeline.embeddings.parts import do_parts_here

        return do_parts_here(work, parts, encoder)

    def run_steps(self, steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
        """See Runner."""
        return run_steps_here(steps)


class OnRay:
    """Runs many parts and steps at once on the Ray cluster that this process is connected to.

    Ray is imported only when this runner is used.
    """

    def do_parts(self, work: "Work", parts: Sequence[int], encoder: "Encoder | None") -> "Iterable[PartMark]":  # noqa: ARG002
        """See Runner. Each actor loads the encoder itself."""
        with needed_for("work on Ray"):
            from pipeline.embeddings.on_ray import do_parts_on_ray

        return do_parts_on_ray(work, parts) if parts else ()

    def run_steps(self, steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
        """See Runner."""
        with needed_for("work on Ray"):
            from pipeline.index.build.on_ray import run_steps_on_ray

        return run_steps_on_ray(steps)


def runner_of(name: RunnerName) -> Runner:
    """The runner with this name. Raises UsageError for an unknown name."""
    if name not in get_args(RunnerName):
        raise UsageError(f"runner {name} is unknown: give here or ray")
    return OnRay() if name == "ray" else Here()
