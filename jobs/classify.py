"""`classify MEMORY IMAGE…`: a decision for each image."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.terminal.arguments import (
    At,
    ImageExtension,
    Json,
    Memory,
    with_question,
)
from jobs.terminal.embedding_work import MaxRejected, show_rejects, show_stages
from jobs.terminal.output import note, print_json, say
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, is_for_ray, runner_option, start_runner

if TYPE_CHECKING:
    from pipeline.decisions.decision import Decision
    from pipeline.decisions.question import Question

LABELS_SHOWN = 3


@with_question
def classify(
    memory: Memory,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            help="Image files to ask about. With --out one SOURCE instead: a folder or URI with images, tar archives, "
            "Parquet files or vectors; or one of these.",
            show_default=False,
        ),
    ],
    question: "Question",
    out: Annotated[
        str | None,
        typer.Option(
            help="Decide about a whole source instead (a folder, archives, tables) and write Parquet files there; "
            "killed and repeated, it goes on.",
            metavar="URI",
        ),
    ] = None,
    exclude_files: Annotated[
        list[str] | None,
        typer.Option(help="With --out: pass over files and folders like this, as `add --exclude`.", metavar="GLOB"),
    ] = None,
    image_extension: ImageExtension = None,
    max_rejected: MaxRejected = None,
    runner: Annotated[str, runner_option("With --out, embed and decide", by_size=False)] = "auto",
    at: At = None,
    json: Json = False,
) -> None:
    """Decide what each IMAGE is, by the votes of its nearest entries; with --out each image of one SOURCE."""
    if out is not None:
        options = {"exclude_files": exclude_files or (), "image_extension": image_extension, "question": question}
        _decide_about_a_source(memory, images, out, at, max_rejected, runner, options, json=json)
        return
    decisions = show_decisions(memory, images, question, at)
    if json:
        print_json([decision.to_json() for decision in decisions])
        return
    for image, decision in zip(images, decisions, strict=True):
        shares = ", ".join(f"{label} {share:.1%}" for label, share in list(decision.votes.items())[:LABELS_SHOWN])
        verdict = f"abstained, {decision.reason}" if decision.abstained else decision.label
        say(f"{image}: {verdict}  ({shares or 'no votes'})")


def _decide_about_a_source(
    memory: str, sources: list[str], out: str, at: int | None, max_rejected: float | None, runner: str,
    options: dict[str, Any], *, json: bool,
) -> None:  # fmt: skip
    if len(sources) != 1:
        raise typer.BadParameter(f"--out takes one SOURCE and {len(sources)} were given: name a folder, or a file")
    check_runner(runner)
    with progress("listing") as on_progress:
        from pipeline import VisualMemory

        where = start_runner(on_progress, on_ray=is_for_ray(runner))
        report = VisualMemory(memory, at=at).classify_source(
            sources[0], out, max_rejected=max_rejected, runner=where, on_progress=on_progress, **options
        )
    if json:
        print_json(report.to_json())
        return
    before = f"; {report.resumed:,} were done before" if report.resumed else ""
    say(
        f"decided about {report.decided:,} of {report.planned:,} images in {report.seconds:.1f} s "
        f"({report.images_per_second:,.0f} images/s{before}) by version {report.version}: "
        f"{report.out}/decisions/*.parquet"
    )
    show_stages(report.stages, report.seconds)
    show_rejects(report.rejected, report.rejects, report.out)


def show_decisions(memory: str, images: list[str], question: "Question", at: int | None) -> "list[Decision]":
    """The decisions of `classify` and `explain`, with what there is to be noted about them."""
    with progress("loading the encoder"):
        from pipeline import VisualMemory
        from pipeline.decisions.small_classes import hint

        target = VisualMemory(memory, at=at)
        decisions = target.classify(images, question=question)
    if decisions and 0 < len(decisions[0].neighbors) < question.k:
        note(f"{len(decisions[0].neighbors):,} entries can vote, fewer than -k {question.k:,}: all of them do")
    if question.balance == 0:
        outvoted = {n.label for d in decisions for n in d.neighbors if n.label != d.label}
        found = [small for small in target.small_classes(question.label_set, question.where) if small.label in outvoted]
        if found:
            note(hint(found))
    return decisions
