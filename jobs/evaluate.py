"""`evaluate MEMORY SOURCE`: how often decisions are right, for each voting and number of neighbours."""

from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from jobs.terminal.arguments import (
    At,
    Balance,
    ExcludeFiles,
    ImageExtension,
    Json,
    LabelSet,
    LabelsFrom,
    Memory,
    Where,
    balance_value,
    count,
    count_or_all,
)
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, is_for_ray, runner_option, start_runner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.decisions.voting import Voting
    from pipeline.questions.evaluation import Evaluation


def evaluate(
    memory: Memory,
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="Folder of labelled images to ask about.", show_default=False),
    ] = None,
    leave_one_out: Annotated[
        bool,
        typer.Option("--leave-one-out", help="Ask about the memory's own entries, each without itself and its copies."),
    ] = False,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "-k", "--k", help="Neighbours. Repeatable.  \\[default: 1, 10, 50, 100]", metavar="N", parser=count
        ),
    ] = None,
    voting: Annotated[
        list[str] | None,
        typer.Option(
            "--voting",
            help="plurality, distance, softmax or rank. Repeatable.  \\[default: all four]",
            metavar="VOTING",
        ),
    ] = None,
    label_set: LabelSet = None,
    where: Where = None,
    sample: Annotated[
        str | None,
        typer.Option(
            help="With --leave-one-out, ask about N entries drawn at random, or about all.  "
            "\\[default: all up to 100,000 labelled entries, 10,000 of more]",
            metavar="N|all",
            parser=count_or_all,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="With --leave-one-out, ask about all entries as a job over parts, and write there which were decided "
            "rightly, as Parquet files; killed and repeated, it goes on.",
            metavar="URI",
        ),
    ] = None,
    runner: Annotated[str, runner_option("With --out, work", by_size=False)] = "auto",
    labels: LabelsFrom = "folder",
    exclude: ExcludeFiles = None,
    image_extension: ImageExtension = None,
    balance: Balance = "0",
    at: At = None,
    json: Json = False,
) -> None:
    """Measure accuracy on the labelled images of SOURCE, or on the memory's own by leave-one-out."""
    if (source is None) != leave_one_out:
        raise typer.BadParameter("give either SOURCE, a folder of labelled images, or --leave-one-out")
    if sample is not None and not leave_one_out:
        raise typer.BadParameter("--sample goes with --leave-one-out: of a SOURCE every image is asked about")
    if out is not None and not leave_one_out:
        raise typer.BadParameter(
            "--out goes with --leave-one-out: decisions about a SOURCE are made by `classify --out`"
        )
    if out is None and runner != "auto":
        raise typer.BadParameter("--runner goes with --out, where each part leaves its result")
    check_runner(runner)
    tau = balance_value(balance)
    with progress("asking about entries" if leave_one_out else "loading the encoder") as on_progress:
        from pipeline import VisualMemory
        from pipeline.decisions.evaluation import DEFAULT_KS
        from pipeline.decisions.voting import VOTINGS, Voting, VotingRule

        ks = sorted(set(k or DEFAULT_KS))
        votings = tuple(VotingRule(voting=cast(Voting, name)).voting for name in dict.fromkeys(voting or VOTINGS))
        target = VisualMemory(memory, at=at)
        if source is None:
            on_ray = out is not None and is_for_ray(runner)
            evaluation = target.evaluate_leave_one_out(
                ks=ks,
                votings=votings,
                balance=tau,
                label_set=label_set,
                where=where,
                sample=cast("int | Literal['all'] | None", sample),
                out=out,
                runner=start_runner(on_progress, on_ray=on_ray),
                on_progress=on_progress,
            )
        else:
            evaluation = target.evaluate(
                source,
                ks=ks,
                votings=votings,
                balance=tau,
                label_set=label_set,
                where=where,
                labels=labels,
                exclude_files=exclude or (),
                image_extension=image_extension,
                on_progress=on_progress,
            )
    if json:
        print_json(evaluation.to_json())
        return
    show(evaluation, auto=tau == "auto")


def show(evaluation: "Evaluation", *, auto: bool) -> None:
    """Print an evaluation as a table."""
    skipped = _skipped(evaluation)
    balance = f", balance {evaluation.balance:g}" if evaluation.balance or auto else ""
    queries = counted(evaluation.num_queries, "query") + _sampled(evaluation)
    label_set = f", label set {evaluation.label_set}" if evaluation.label_set is not None else ""
    where = f", where {evaluation.where}" if evaluation.where is not None else ""
    say(f"{queries}{skipped}{label_set}{where}, version {evaluation.version}{balance}; percent right at k =")
    if evaluation.held_already:
        say(
            f"note: {evaluation.held_already:,} of these {evaluation.num_queries:,} images are in the memory already, "
            "by their bytes: of them this measures memory, not how well others are told"
        )
    ks = list(next(iter(evaluation.accuracy.values())))
    say(f"  {'voting':<10}" + "".join(f"{k:>8}" for k in ks))
    _show_rows(evaluation.accuracy)
    voting, k = evaluation.best
    labels = sorted(evaluation.by_label[voting][k].items(), key=lambda pair: pair[1])
    if len(labels) > 1:
        say("  averaged over the classes, however many queries each has:")
        _show_rows(evaluation.balanced_accuracy)
        weakest = ", ".join(f"{label} {percent:.1f}" for label, percent in labels[:3])
        say(f"best: {voting} at k = {k}, {evaluation.accuracy[voting][k]:.1f}; its weakest classes: {weakest}")


def _show_rows(percents: "Mapping[Voting, Mapping[int, float]]") -> None:
    """Print a line for each voting with its percentages, in the order of k."""
    for voting, by_k in percents.items():
        say(f"  {voting:<10}" + "".join(f"{percent:>8.1f}" for percent in by_k.values()))


def _sampled(evaluation: "Evaluation") -> str:
    """How many entries the queries were drawn from, and how far off the accuracies may be."""
    if evaluation.sampling_error is None:
        return ""
    widest = max(error for by_k in evaluation.sampling_error.values() for error in by_k.values())
    return f" drawn at random from {evaluation.labelled:,} labelled entries (accurate to ±{widest:.1f}, 19 times in 20)"


def _skipped(evaluation: "Evaluation") -> str:
    """How many images were not asked about, and why."""
    unlabelled = evaluation.skipped - evaluation.unreadable - evaluation.without_word
    others = (
        (evaluation.unreadable, "could not be read"),
        (unlabelled, "without a label"),
        (evaluation.without_word, f"of labels that the label set {evaluation.label_set} has no word for"),
    )
    said = ", ".join(f"{count:,} more {why}" for count, why in others if count)
    return f" ({said})" if said else ""
