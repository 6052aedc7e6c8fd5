"""`explain MEMORY IMAGE`: one decision with every neighbour behind it, as text or as a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.classify import show_decisions
from jobs.terminal.arguments import (
    At,
    Json,
    Memory,
    with_question,
)
from jobs.terminal.output import print_json, say
from jobs.terminal.progress import progress

if TYPE_CHECKING:
    from pipeline.decisions.decision import Decision
    from pipeline.decisions.question import Question

BAR_WIDTH = 20


@with_question
def explain(
    memory: Memory,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file to ask about.", show_default=False)],
    question: "Question",
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page with thumbnails.", metavar="FILE")
    ] = None,
    at: At = None,
    json: Json = False,
) -> None:
    """Show the decision for IMAGE with every neighbour's label, similarity and weight."""
    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder of {html} does not exist: make it first", param_hint="--html")
    [decision] = show_decisions(memory, [image], question, at)
    with progress("making the page" if html is not None else "reading what is kept"):
        from pipeline import VisualMemory

        target = VisualMemory(memory, at=at)
        decision = target.with_kept(decision)
        if html is not None:
            from pipeline.questions.page import write_page

            write_page(target.explanation_page(decision), html)
    if json:
        print_json(decision.to_json() | ({"html": str(html)} if html else {}))
        return
    show(decision, image)
    if html is not None:
        say("")
        say(f"written as a page: {html}")


def show(decision: "Decision", image: str) -> None:
    """Print a decision with its evidence."""
    verdict = f"abstained: {decision.reason}" if decision.abstained else decision.label
    say(image)
    say(f"decision: {verdict}")
    say(f"confidence {decision.confidence:.1%}, margin {decision.margin:.1%}, version {decision.version}")
    voted = f"{decision.voting} voting of {len(decision.neighbors)} neighbours"
    if decision.label_set is not None:
        voted += f", label set {decision.label_set}"
    if decision.where is not None:
        voted += f", where {decision.where}"
    say("")
    say(f"votes ({voted}{f', balance {decision.balance:g}' if decision.balance else ''})")
    width = max((len(label) for label in decision.votes), default=0)
    for label, share in decision.votes.items():
        say(f"  {label:<{width}}  {share:>6.1%}  {'█' * round(share * BAR_WIDTH)}")
    say("")
    say("neighbours: rank, label, similarity, weight, id, uri")
    width = max((len(neighbor.label or "") for neighbor in decision.neighbors), default=0)
    for n in decision.neighbors:
        kept = "".join(f"  {name}={value}" for name, value in n.kept.items() if value is not None)
        entry = f"{n.id}  {n.uri}{kept}"
        say(f"  {n.rank:>3}  {n.label or '':<{width}}  {n.similarity:.4f}  {n.weight or 0.0:>6.1%}  {entry}")
