"""`forget MEMORY`: take entries out of every later answer."""

from typing import Annotated

import typer

from jobs.arguments import Json, Memory
from jobs.terminal import print_json, say


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

    report = VisualMemory(memory).forget(ids=id or [], uris=uri or [], labels=label or [], datasets=dataset or [])
    if json:
        print_json(report.to_json())
        return
    entries = "1 entry" if report.forgotten == 1 else f"{report.forgotten:,} entries"
    say(f"forgot {entries}; nothing returns them from version {report.version} on")
