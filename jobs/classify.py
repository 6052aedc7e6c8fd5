"""`classify MEMORY IMAGE…`: a decision for each image."""

from typing import Annotated, cast

import typer

from jobs.arguments import (
    AbstainBelow,
    Assume,
    At,
    Balance,
    Exclude,
    Images,
    Json,
    LabelSet,
    Memory,
    Voting,
    Weigh,
    balance_value,
    pair,
    weights_by_id,
)
from jobs.terminal import note, print_json, say
from pipeline.decisions.decision import Decision

LABELS_SHOWN = 3


def classify(
    memory: Memory,
    images: Images,
    k: Annotated[int, typer.Option("-k", "--k", help="How many neighbours vote.", metavar="K")] = 50,
    voting: Voting = "rank",
    label_set: LabelSet = None,
    exclude: Exclude = None,
    weigh: Weigh = None,
    assume: Assume = None,
    balance: Balance = "0",
    abstain_below: AbstainBelow = 0.0,
    at: At = None,
    json: Json = False,
) -> None:
    """Decide what each IMAGE is, by the votes of its nearest entries."""
    decisions = decided(memory, images, k, voting, label_set, exclude, weigh, assume, balance, abstain_below, at)
    if json:
        print_json([decision.to_json() for decision in decisions])
        return
    for image, decision in zip(images, decisions, strict=True):
        shares = ", ".join(f"{label} {share:.1%}" for label, share in list(decision.votes.items())[:LABELS_SHOWN])
        verdict = f"abstained, {decision.reason}" if decision.abstained else decision.label
        say(f"{image}: {verdict}  ({shares or 'no votes'})")


def decided(
    memory: str,
    images: list[str],
    k: int,
    voting: str,
    label_set: str | None,
    exclude: list[int] | None,
    weigh: list[str] | None,
    assume: list[str] | None,
    balance: str,
    abstain_below: float,
    at: int | None,
) -> list[Decision]:
    """The decisions that the options of `classify` and `explain` ask for."""
    tau, weights, labels = balance_value(balance), weights_by_id(weigh or []), dict(map(pair, assume or []))
    from pipeline import VisualMemory
    from pipeline.decisions.voting import Voting as Known

    decisions = VisualMemory(memory, at=at).classify(
        images,
        k,
        cast(Known, voting),
        exclude=exclude or [],
        weigh=weights,
        assume=labels,
        balance=tau,
        abstain_below=abstain_below,
        label_set=label_set,
    )
    if decisions and 0 < len(decisions[0].neighbors) < k:
        note(f"{len(decisions[0].neighbors):,} entries can vote, fewer than -k {k:,}: all of them do")
    return decisions
