"""Shared by the verbs that embed: how many images may be rejected, and how the result is reported."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.terminal.output import counted, say

if TYPE_CHECKING:
    from pipeline.embeddings.stages import Stages
    from pipeline.embeddings.tally import Reject

REJECTS_SHOWN = 10
# Seconds of a run from which a verdict on its time is worth printing. In a shorter run, startup is a large part, and
# nobody buys a GPU, or moves the images, to save minutes.
WORTH_A_VERDICT = 300.0

MaxRejected = Annotated[
    float | None,
    typer.Option(
        "--max-rejected",
        help="Stop when more than this share of the images is rejected.  \\[default: 0.05, from 10 images on]",
        metavar="SHARE",
    ),
]


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
