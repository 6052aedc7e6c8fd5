"""`influence MEMORY`: which decisions some entries sway, and what the accuracy would be without them."""

from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from jobs.terminal.arguments import (
    Assume,
    At,
    Json,
    LabelSet,
    LabelsFrom,
    Memory,
    Weigh,
    count,
    count_or_all,
    pair,
    weights_by_id,
)
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress

if TYPE_CHECKING:
    from pipeline.decisions.voting import Voting
    from pipeline.questions.influence import InfluenceReport

CLASSES_SHOWN = 5


def influence(
    memory: Memory,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of labelled images to ask about.  \\[default: the memory's own entries, by leave-one-out]",
            show_default=False,
        ),
    ] = None,
    id: Annotated[  # noqa: A002
        list[int] | None, typer.Option("--id", help="Without this entry. Repeatable.", metavar="ID")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Without the entries that have this label.", metavar="LABEL")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Without the entries of this dataset.", metavar="NAME")] = None,
    assume: Assume = None,
    weigh: Weigh = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Neighbours that vote.", metavar="N", parser=count)] = 50,
    voting: Annotated[str, typer.Option(help="plurality, distance, softmax or rank.", metavar="VOTING")] = "rank",
    balance: Annotated[
        float, typer.Option(help="Power of class sizes that votes are divided by.", metavar="TAU")
    ] = 0.0,
    sample: Annotated[
        str | None,
        typer.Option(
            help="Without SOURCE, ask about N entries drawn at random, or about all.  "
            "\\[default: all up to 100,000 labelled entries, 10,000 of more]",
            metavar="N|all",
            parser=count_or_all,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(help="List so many decisions: those that flip first.", metavar="N", parser=count)
    ] = 20,
    labels: LabelsFrom = "folder",
    label_set: LabelSet = None,
    at: At = None,
    json: Json = False,
) -> None:
    """Show where entries vote, which decisions flip without them, and the accuracy then. Changes nothing."""
    if sample is not None and source is not None:
        raise typer.BadParameter("--sample goes with leave-one-out: of a SOURCE every image is asked about")
    with progress("opening the memory") as on_progress:
        from pipeline import VisualMemory

        report = VisualMemory(memory, at=at).influence(
            source,
            ids=id or [],
            label=label,
            dataset=dataset,
            assume=dict(map(pair, assume or [])),
            weigh=weights_by_id(weigh or []),
            k=k,
            voting=cast("Voting", voting),
            balance=balance,
            sample=cast("int | Literal['all'] | None", sample),
            limit=limit,
            label_set=label_set,
            labels=labels,
            on_progress=on_progress,
        )
    if json:
        print_json(report.to_json())
        return
    _show(report)


def _show(report: "InfluenceReport") -> None:
    asked = counted(report.num_questions, "question")
    if report.num_questions < report.asked_of:
        asked += f" drawn at random from {report.asked_of:,}"
    say(
        f"{counted(report.entries, 'entry')}, {asked}, {report.voting} voting at k = {report.k}, version "
        f"{report.version}: voted in {report.voted_in:,}, with {report.mean_share:.1%} of the votes on average"
    )
    if report.unreadable:
        say(f"{counted(report.unreadable, 'image')} could not be read")
    if report.without_word:
        say(f"{counted(report.without_word, 'image')} of labels that the label set {report.label_set} has no word for")
    of_them = f", {report.mended:,} become right and {report.spoiled:,} wrong" if report.flips else ""
    say(f"{counted(report.flips, 'decision')} would flip{of_them}")
    if report.before is not None and report.after is not None:
        say(
            f"accuracy {report.before.accuracy:.2f}% now, {report.after.accuracy:.2f}% then; balanced "
            f"{report.before.balanced_accuracy:.2f}% and {report.after.balanced_accuracy:.2f}%"
        )
    changed = sorted(
        (after - before, label, before, after)
        for label, (before, after) in report.by_label.items()
        if before is not None and after is not None and before != after
    )
    if changed:
        most = sorted(changed, key=lambda each: -abs(each[0]))[:CLASSES_SHOWN]
        said = ", ".join(f"{label} {before:.1f} -> {after:.1f}" for _, label, before, after in most)
        say(f"classes that change most: {said}")
    if report.swayed:
        say("share of votes, decision now, then, true label, uri")
    for each in report.swayed:
        now, then = each.before or "no decision", each.after or "no decision"
        arrow = f"{now} -> {then}" if each.flips else now
        say(f"  {each.share:>6.1%}  {arrow}  ({each.truth or 'unknown'})  {each.uri}")
