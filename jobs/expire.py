"""`expire MEMORY --keep AGE`: drop old versions and the files that only they needed."""

from typing import Annotated

import typer

from jobs.terminal.arguments import Json, Memory, age_or_count, command_line
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress


def expire(
    memory: Memory,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            help="30d: all that MEMORY was in the last 30 days (s, m, h, d, w); 100: the newest 100 versions.",
            metavar="AGE|N",
            show_default=False,
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    json: Json = False,
) -> None:
    """Drop the versions of MEMORY that are older. The newest stays, and so does every entry it has."""
    kept = age_or_count("--keep", keep)
    with progress("reading the versions") as on_progress:
        from pipeline import VisualMemory

        target = VisualMemory(memory)
        if dry_run:
            report = target.plan_expire(kept)
        else:
            report = target.expire(kept, command=command_line(memory), on_progress=on_progress)
    if json:
        print_json(report.to_json())
        return
    verb, ending = ("would drop", "; nothing was changed") if dry_run else ("dropped", "")
    say(
        f"{verb} {counted(report.dropped, 'version')}, {counted(report.files, 'file')} with "
        f"{report.num_bytes / 1e6:,.1f} MB; kept: versions {report.first_kept} to {report.newest}{ending}"
    )
