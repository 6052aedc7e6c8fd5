"""Shared by the verbs that do much work: where they run; and how those that embed report the result."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs.terminal.output import counted, say
from pipeline.progress import OnProgress, Progress, ignore_progress

if TYPE_CHECKING:
    from pipeline.embeddings.stages import Stages
    from pipeline.embeddings.tally import Reject

REJECTS_SHOWN = 10
# Seconds of a run from which a verdict on its time is worth printing. In a shorter run, startup is a large part, and
# nobody buys a GPU, or moves the images, to save minutes.
WORTH_A_VERDICT = 300.0

# Rows from which `index`, `compact` and `export` run on Ray: below, starting Ray takes longer than what it saves.
RAY_FROM = 4_000_000

RUNNERS = ("auto", "here", "ray")


def runner_option(verb: str) -> Any:
    """The option `--runner`, whose help begins with `verb`."""
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
    """Raises BadParameter for an unknown runner."""
    if runner not in RUNNERS:
        raise typer.BadParameter(f"--runner {runner} is unknown: give auto, here or ray")


def is_for_ray(runner: str, rows: int = 0) -> bool:
    """Whether work on so many rows runs on Ray: if that is chosen, or left to us and it is much or part of a job."""
    if runner != "auto":
        return runner == "ray"
    from jobs.ray_cluster.on_ray import is_a_job

    return rows >= RAY_FROM or is_a_job()


def start_runner(on_progress: OnProgress = ignore_progress, *, on_ray: bool) -> Literal["here", "ray"]:
    """The runner for the library. Connects to Ray, or starts it, if `on_ray`."""
    if not on_ray:
        return "here"
    on_progress(Progress("starting Ray", 0, None))
    from jobs.ray_cluster.on_ray import start_ray

    start_ray()
    return "ray"


def show_stages(stages: "Stages", seconds: float) -> None:
    """Print where the time of a long run went, and what would help most."""
    verdict = stages.verdict()
    if verdict is None or seconds < WORTH_A_VERDICT:
        return
    say(
        f"workers: model {stages.model:,.1f} s, waiting {stages.waiting:,.1f} s, writing {stages.writing:,.1f} s; "
        f"beside it, in threads, reading {stages.reading:,.1f} s, decoding {stages.decoding:,.1f} s"
    )
    say(f"bound by {verdict[0]}: {verdict[1]}")


def show_rejects(num_rejected: int, rejects: "Sequence[Reject]", folder: str) -> None:
    """Print the first rejected images with their reasons, and the folder that lists all of them."""
    if not rejects:
        return
    say(f"{counted(num_rejected, 'image')} rejected:")
    for reject in rejects[:REJECTS_SHOWN]:
        say(f"  {reject.uri}: {reject.reason} ({reject.stage})")
    if num_rejected > REJECTS_SHOWN:
        say(f"  … and {num_rejected - REJECTS_SHOWN:,} more: {folder}/rejected/*.parquet")
