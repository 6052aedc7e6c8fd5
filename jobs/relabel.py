"""`relabel MEMORY`: correct the labels of entries, or make a label set."""

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.terminal.arguments import Json, Memory, command_line
from jobs.terminal.output import counted, note, print_json, say
from jobs.terminal.progress import progress

if TYPE_CHECKING:
    from pipeline.edits.relabel import RelabelReport

SHOWN = 5


def relabel(
    memory: Memory,
    id: Annotated[list[int] | None, typer.Option("--id", help="An entry's id. Repeatable.", metavar="ID")] = None,  # noqa: A002
    label: Annotated[
        str | None, typer.Option("--label", help="The label that the entries of --id get.", metavar="LABEL")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", help="CSV, Parquet or JSON with id or uri, and label.", metavar="FILE"),
    ] = None,
    label_set: Annotated[
        str | None,
        typer.Option(
            "--label-set",
            help="Say it of this label set, made if need be.  \\[default: labels as stored]",
            metavar="NAME",
        ),
    ] = None,
    map: Annotated[  # noqa: A002
        str | None,
        typer.Option("--map", help="CSV, Parquet or JSON: for each label as stored one of the set.", metavar="FILE"),
    ] = None,
    json: Json = False,
) -> None:
    """Correct the labels of entries, or make a label set to ask by; the entries stay as they are."""
    with progress("looking for the entries"):
        from pipeline import VisualMemory

        report = VisualMemory(memory).relabel(
            ids=id or [], label=label, file=file, label_set=label_set, map=map, command=command_line(memory)
        )
    if json:
        print_json(report.to_json())
        return
    show(report)


def show(report: "RelabelReport") -> None:
    """Print what was corrected."""
    where = "" if report.label_set is None else f" in the label set {report.label_set}"
    coverage = report.coverage
    if not report.committed:
        same = "it has this very map" if coverage else f"{counted(report.unchanged, 'entry')} had the label already"
        say(f"nothing to change{where}: {same}")
    elif coverage is None:
        same = f" ({report.unchanged:,} had the label already)" if report.unchanged else ""
        done = f"relabelled {counted(report.relabelled, 'entry')}{where}{same}"
        say(f"{done}: every answer from version {report.version} on knows it")
    else:
        say(
            f"label set {report.label_set}: {counted(report.labels, 'label')}, {counted(report.relabelled, 'entry')} "
            f"relabelled; --label-set {report.label_set} asks by it from version {report.version} on"
        )
    if coverage is not None and coverage.lacking:
        note(
            f"the map covers {coverage.covered:,} of {counted(coverage.covered + len(coverage.lacking), 'label')} "
            f"as stored; entries of the others take up no rank when asked by it: {_some(coverage.lacking)}"
        )
    if coverage is not None and coverage.unused:
        belong = "belongs" if len(coverage.unused) == 1 else "belong"
        note(f"{counted(len(coverage.unused), 'label')} of the map {belong} to no entry: {_some(coverage.unused)}")


def _some(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:SHOWN]) + (", …" if len(labels) > SHOWN else "")
