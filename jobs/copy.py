"""`copy MEMORY TARGET`: a memory whole, in another place."""

from typing import Annotated

import typer

from jobs.terminal.arguments import Json, Memory
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, is_for_ray, runner_option, start_runner


def copy(
    memory: Memory,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Empty or new folder, or s3://…", show_default=False)],
    runner: Annotated[str, runner_option("Copy", by_size=False)] = "auto",
    json: Json = False,
) -> None:
    """Copy MEMORY with all its versions to TARGET, every file checked. Killed and repeated, it goes on.

    From one place of an object store to another, the store itself copies, and only lengths are checked.
    """
    check_runner(runner)
    with progress("looking at the files") as on_progress:
        from pipeline import VisualMemory

        where = start_runner(on_progress, on_ray=is_for_ray(runner))
        report = VisualMemory(memory).copy(target, runner=where, on_progress=on_progress)
    if json:
        print_json(report.to_json())
        return
    done = f"{counted(report.files, 'file')} with {report.num_bytes / 1e6:,.1f} MB in {report.seconds:.1f} s"
    before = f" ({counted(report.already, 'file')} had been before)" if report.already else ""
    say(f"copied {done}{before}: {report.uri} holds versions {report.first_version} to {report.version}")
