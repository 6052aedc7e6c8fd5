"""`forget MEMORY`: take entries out of every later answer."""

from typing import Annotated

import typer

from jobs.arguments import Json, Memory, command_line
from jobs.terminal import counted, print_json, say


def forget(
    memory: Memory,
    id: Annotated[list[int] | None, typer.Option("--id", help="An entry's id. Repeatable.", metavar="ID")] = None,  # noqa: A002
    uri: Annotated[list[str] | None, typer.Option("--uri", help="An entry's uri. Repeatable.", metavar="URI")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="All entries of a label. Repeatable.", metavar="LABEL")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="All entries of a dataset. Repeatable.", metavar="NAME")
    ] = None,
    json: Json = False,
) -> None:
    """Forget the entries that any of the options names."""
    from pipeline import VisualMemory

    report = VisualMemory(memory).forget(
        ids=id or [], uris=uri or [], labels=label or [], datasets=dataset or [], command=command_line(memory)
    )
    if json:
        print_json(report.to_json())
        return
    say(f"forgot {counted(report.forgotten, 'entry')}: no answer from version {report.version} on returns any of them")
