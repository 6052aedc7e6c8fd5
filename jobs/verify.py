"""`verify MEMORY`: check every invariant, and remove what belongs to nobody."""

import time
from typing import Annotated

import typer

from jobs.terminal.arguments import Json, Memory, command_line
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, is_for_ray, runner_option, start_runner


def verify(
    memory: Memory,
    clean: Annotated[
        bool, typer.Option("--clean", help="First remove files that no version names and no live process works on.")
    ] = False,
    runner: Annotated[str, runner_option("Read the files", by_size=False)] = "auto",
    json: Json = False,
) -> None:
    """Check every version of MEMORY, every file they name, and that all of it agrees. Exit status 1 if it does not."""
    check_runner(runner)
    began = time.monotonic()
    with progress("reading the versions") as on_progress:
        from pipeline import VisualMemory

        target = VisualMemory(memory)
        where = start_runner(on_progress, on_ray=is_for_ray(runner))
        report = target.verify(clean=clean, runner=where, command=command_line(memory), on_progress=on_progress)
    if json:
        print_json(report.to_json())
    else:
        for finding in report.findings:
            say(f"{finding.severity:<6}  {finding.path}: {finding.what}; {finding.advice}")
        if report.removed is not None:
            say(f"removed {counted(report.removed, 'file')} that belonged to nobody")
        damaged = sum(finding.severity == "damage" for finding in report.findings)
        unread = sum(finding.severity == "unread" for finding in report.findings)
        verdict = "sound" if report.sound else f"not sound ({damaged:,} damaged)"
        if unread:
            known = f", {damaged:,} damaged" if damaged else ""
            verdict = f"not known to be sound ({counted(unread, 'file')} may not be read{known})"
        up_to = f"{counted(report.versions, 'version')} up to {report.version}" if report.versions else "no version yet"
        checked = f"{up_to}, {counted(report.files, 'file')}"
        garbage = f", {report.garbage_bytes / 1e6:,.1f} MB of garbage" if report.garbage_bytes else ""
        seconds = time.monotonic() - began
        say(f"{verdict}: {checked} of {report.num_bytes / 1e6:,.1f} MB checked in {seconds:.1f} s{garbage}")
    if not report.sound:
        raise typer.Exit(1)
