"""`suspects MEMORY`: the entries whose labels a person should look at."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from jobs.terminal.arguments import At, Json, LabelSet, Memory, Where, count
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress

if TYPE_CHECKING:
    from pipeline.questions.suspects import Kind, Suspect, SuspectsReport


def suspects(
    memory: Memory,
    limit: Annotated[
        int,
        typer.Option("--limit", help="List so many suspects, the most suspicious first.", metavar="N", parser=count),
    ] = 100,
    k: Annotated[
        int, typer.Option("-k", "--k", help="Nearest others that decide about an entry.", metavar="N", parser=count)
    ] = 10,
    kind: Annotated[
        str | None,
        typer.Option(help="List one kind alone.  \\[default: all]", metavar="mislabelled|ambiguous|duplicated"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page with pictures.", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write a CSV file to look through: `relabel --file` takes the labels that are right, and "
            "`forget --file` the entries that should go.",
            metavar="FILE",
        ),
    ] = None,
    label_set: LabelSet = None,
    where: Where = None,
    at: At = None,
    json: Json = False,
) -> None:
    """List entries that are likely mislabelled, ambiguous or duplicated, by leave-one-out. Changes nothing."""
    _check_places(html, out)
    with progress("opening the memory") as on_progress:
        from pipeline import VisualMemory

        target = VisualMemory(memory, at=at)
        report = target.suspects(
            limit, k=k, kind=cast("Kind | None", kind), label_set=label_set, where=where, on_progress=on_progress
        )
        if html is not None:
            from pipeline.questions.page import write_page

            write_page(target.suspects_page(report), html)
        if out is not None:
            from pipeline.questions.suspects import write_corrections

            write_corrections(report.suspects, out)
    files = {name: str(path) for name, path in (("html", html), ("out", out)) if path is not None}
    if json:
        print_json(report.to_json() | files)
        return
    _show(report)
    if html is not None:
        say(f"written as a page: {html}")
    if out is not None:
        in_set = f" --label-set {shlex.quote(label_set)}" if label_set is not None else ""
        command = f"relabel {shlex.quote(memory)} --file {shlex.quote(str(out))}{in_set}"
        say(f"written to look through: {out}; keep the rows that are right, then `visual-memory {command}`")


def _check_places(html: Path | None, out: Path | None) -> None:
    """Raises UsageError if one of the files cannot be written, before the search, which takes long."""
    from pipeline.errors import UsageError
    from pipeline.questions.page import check_place

    if html is not None:
        check_place(html)
    if out is None:
        return
    if html is not None and html.absolute() == out.absolute():
        raise UsageError(f"{html} is named twice: give the page and the table files of their own")
    if out.exists():
        raise UsageError(f"{out} is there already: name another file for the corrections")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder of {out} does not exist: make it first")


def _show(report: "SuspectsReport") -> None:
    found = ", ".join(f"{number:,} {kind}" for kind, number in report.counts.items())
    label_set = f", label set {report.label_set}" if report.label_set is not None else ""
    where = f", where {report.where}" if report.where is not None else ""
    say(f"{counted(report.labelled, 'labelled entry')}{label_set}{where}, version {report.version}: {found}")
    if not report.suspects:
        return
    labels = [_labels(suspect) for suspect in report.suspects]
    width = max(len(label) for label in [*labels, "label"])
    say("own, other: votes of its nearest for its label and for another; right, wrong: as a neighbour of others")
    say(f"  {'kind':<11}  {'label':<{width}}   own other  right wrong  id, uri")
    for suspect, label in zip(report.suspects, labels, strict=True):
        shares = f"{suspect.share:>5.0%} {suspect.suggested_share:>5.0%}"
        beside = f"{suspect.right:>5,} {suspect.wrong:>5,}"
        same = f"  copy of {suspect.duplicate_of}" if suspect.duplicate_of is not None else ""
        say(f"  {suspect.kind:<11}  {label:<{width}}  {shares}  {beside}  {suspect.id}  {suspect.uri}{same}")


def _labels(suspect: "Suspect") -> str:
    if suspect.kind == "duplicated" or suspect.suggested is None:
        return suspect.label
    return f"{suspect.label} {'->' if suspect.kind == 'mislabelled' else 'or'} {suspect.suggested}"
