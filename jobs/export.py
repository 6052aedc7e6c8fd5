"""`export MEMORY OUT`: the live entries as files of vectors that other tools read, and that `add` takes in again."""

from typing import Annotated, cast

import typer

from jobs.terminal.arguments import At, Json, Memory, count
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, is_for_ray, runner_option, start_runner


def export(
    memory: Memory,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Empty or new folder, or s3://…", show_default=False)],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="img_emb/*.npy with metadata/*.parquet, or Parquet with the vectors in a column.",
            metavar="clip-retrieval|parquet",
        ),
    ] = "clip-retrieval",
    rows_per_file: Annotated[
        int, typer.Option(help="Entries in each file of vectors.", metavar="N", parser=count)
    ] = 1_000_000,
    runner: Annotated[str, runner_option("Write the files")] = "auto",
    at: At = None,
    json: Json = False,
) -> None:
    """Write the entries that are not forgotten to OUT, with their labels as they are now."""
    check_runner(runner)
    with progress("reading the entries") as on_progress:
        from pipeline import VisualMemory
        from pipeline.edits.export_files import Format

        target = VisualMemory(memory, at=at)
        report = target.export(
            out,
            cast(Format, file_format),
            rows_per_file=rows_per_file,
            runner=start_runner(on_progress, on_ray=is_for_ray(runner, target.state().num_live)),
            on_progress=on_progress,
        )
    if json:
        print_json(report.to_json())
        return
    before = f" ({counted(report.already, 'file')} had been before)" if report.already else ""
    say(
        f"exported {counted(report.entries, 'entry')} of version {report.version} in {counted(report.files, 'file')} "
        f"of vectors, {report.num_bytes / 1e6:,.1f} MB in {report.seconds:.1f} s{before}: {report.uri}"
    )
