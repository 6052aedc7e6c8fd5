"""`rollback MEMORY VERSION`: make a memory what it was."""

from typing import Annotated

import typer

from jobs.terminal.arguments import Json, Memory, command_line
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress


def rollback(
    memory: Memory,
    version: Annotated[
        int | None, typer.Argument(metavar="VERSION", help="As `history` numbers them.", show_default=False)
    ] = None,
    to: Annotated[int | None, typer.Option("--to", help="The same as VERSION.", metavar="VERSION")] = None,
    json: Json = False,
) -> None:
    """Commit a new version that is what VERSION was. Nothing in between is lost: it can be rolled back too."""
    given = [number for number in (version, to) if number is not None]
    if len(given) != 1:
        raise typer.BadParameter("give one VERSION to roll back to: `history` shows them")
    with progress("reading the versions"):
        from pipeline import VisualMemory

        report = VisualMemory(memory).rollback(given[0], command=command_line(memory))
    if json:
        print_json(report.to_json())
        return
    say(
        f"the memory is what it was at version {report.rolled_back_to}: {counted(report.entries, 'entry')} "
        f"({report.entries_before:,} before); it is at version {report.version}"
    )
