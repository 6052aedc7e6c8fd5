"""`history MEMORY`: its versions, the newest first."""

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.terminal.arguments import Json, Memory, count
from jobs.terminal.output import note, print_json, say
from jobs.terminal.progress import progress
from pipeline.errors import FirstAddUnfinished

if TYPE_CHECKING:
    from pipeline.store.log.history import VersionSummary

WIDTH = 80
INDENT = 9  # the second line of a version begins below the time of the first


def history(
    memory: Memory,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Show this many at most.", metavar="N", parser=count)
    ] = None,
    json: Json = False,
) -> None:
    """List the versions of MEMORY: when, by whom, how many entries there were then, and what was done."""
    try:
        with progress("reading the versions"):
            from pipeline import VisualMemory

            found = VisualMemory(memory).history(limit)
    except FirstAddUnfinished as unfinished:
        note(str(unfinished))
        found = []
    if json:
        print_json([version.to_json() for version in found])
        return
    if not found:
        return
    say(f"{'version':>7}  {'committed (UTC)':<19}  {'entries':>11}  {'change':>9}  by")
    for version in found:
        _show(version)


def _show(version: "VersionSummary") -> None:
    difference = version.rows_after - version.rows_before
    change = f"{difference:+,}" if difference else ""
    when = f"{version.committed_at:%Y-%m-%d %H:%M:%S}"
    say(f"{version.version:>7}  {when}  {version.rows_after:>11,}  {change:>9}  {version.author}")
    done = f"{version.command} -> {', '.join(version.actions) or 'nothing left of it'}"
    whole_words = textwrap.TextWrapper(
        WIDTH,
        initial_indent=" " * INDENT,
        subsequent_indent=" " * (INDENT + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
    for line in whole_words.wrap(done):
        say(line)
