"""What the verbs that embed a whole source have in common: where they run, and how they tell what came of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs.terminal.output import counted, say
from pipeline.progress import OnProgress, Progress, ignore_progress

if TYPE_CHECKING:
    from pipeline.embeddings.stages import Stages
    from pipeline.embeddings.tally import Reject

REJECTS_SHOWN = 10
# Seconds of a run from which on it is worth saying where they went. Below, starting up is a large part of them, and
# nobody buys a GPU, or moves the images, for a wait of minutes.
WORTH_A_VERDICT = 300.0

RUNNERS = ("auto", "here", "ray")


def runner_option(verb: str) -> Any:
    """`--runner`, with the verb for what is run."""
    does = f"{verb} in this process, on Ray, or decide by how much there is to do."
    return typer.Option("--runner", help=does, metavar="auto|here|ray")


Runner = Annotated[str, runner_option("Embed")]
MaxRejected = Annotated[
    float | None,
    typer.Option(
        "--max-rejected",
        help="Stop when more than this share of the images is rejected.  \\[default: 0.05, from 10 images on]",
        metavar="SHARE",
    ),
]


def check_runner(runner: str) -> None:
    """Raises BadParameter for one that is not known."""
    if runner not in RUNNERS:
        raise typer.BadParameter(f"--runner {runner} is unknown: give auto, here or ray")


def started_runner(on_progress: OnProgress = ignore_progress, *, on_ray: bool) -> Literal["here", "ray"]:
    """The runner for the library; Ray is connected to, or started, if it is that."""
    if not on_ray:
        return "here"
    on_progress(Progress("starting Ray", 0, None))
    from jobs.ray_cluster.on_ray import start_ray

    start_ray()
    return "ray"


def show_stages(stages: "Stages", seconds: float) -> None:
    """Where the time of a long run went, and what would help most."""
    verdict = stages.verdict()
    if verdict is None or seconds < WORTH_A_VERDICT:
        return
    say(
        f"workers: model {stages.model:,.1f} s, waiting {stages.waiting:,.1f} s, writing {stages.writing:,.1f} s; "
        f"beside it, in threads, reading {stages.reading:,.1f} s, decoding {stages.decoding:,.1f} s"
    )
    say(f"bound by {verdict[0]}: {verdict[1]}")


def show_rejects(num_rejected: int, rejects: "Sequence[Reject]", folder: str) -> None:
    """The first of the images that were rejected, with the reason; all of them stand in a folder."""
    if not rejects:
        return
    say(f"{counted(num_rejected, 'image')} rejected:")
    for reject in rejects[:REJECTS_SHOWN]:
        say(f"  {reject.uri}: {reject.reason} ({reject.stage})")
    if num_rejected > REJECTS_SHOWN:
        say(f"  … and {num_rejected - REJECTS_SHOWN:,} more: {folder}/rejected/*.parquet")
