"""`compact MEMORY`: pack small files into few, which are quicker to open and cheaper to list."""

from typing import Annotated

from jobs.terminal.arguments import Json, Memory, command_line
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, is_for_ray, runner_option, start_runner


def compact(memory: Memory, runner: Annotated[str, runner_option("Pack")] = "auto", json: Json = False) -> None:
    """Pack the small files of MEMORY. Every id, label and answer stays; so do older versions, with their files."""
    check_runner(runner)
    with progress("looking for small files") as on_progress:
        from pipeline import VisualMemory
        from pipeline.edits.compact import small_rows

        target = VisualMemory(memory)
        where = start_runner(on_progress, on_ray=is_for_ray(runner, small_rows(target.state())))
        report = target.compact(runner=where, command=command_line(memory), on_progress=on_progress)
    if json:
        print_json(report.to_json())
        return
    if not report.committed:
        say(f"there is nothing to pack: {counted(report.files_after, 'file')} of entries and what lies over them")
        return
    say(
        f"packed {counted(report.files_before, 'file')} and {counted(report.pending, 'single add')} into "
        f"{counted(report.files_after, 'file')}; the memory is at version {report.version}. Older versions keep the "
        "files they need: `expire` drops them"
    )
