"""Where a verb that does much work runs: the option `--runner`, and Ray started for it."""

from typing import Any, Literal

import typer

from pipeline.progress import OnProgress, Progress, ignore_progress

# Rows from which `index`, `compact` and `export` run on Ray: below, starting Ray takes longer than what it saves.
RAY_FROM = 4_000_000

RUNNERS = ("auto", "here", "ray")


def runner_option(verb: str, *, by_size: bool = True) -> Any:
    """The option `--runner`, whose help begins with `verb`; `by_size` if auto goes by how much there is to do too."""
    much = ", or if there is much to do" if by_size else ""
    does = f"{verb} in this process or on Ray; auto takes Ray within a job{much}."
    return typer.Option("--runner", help=does, metavar="auto|here|ray")


def check_runner(runner: str) -> None:
    """Raises BadParameter for an unknown runner."""
    if runner not in RUNNERS:
        raise typer.BadParameter(f"--runner {runner} is unknown: give auto, here or ray")


def is_for_ray(runner: str, rows: int = 0) -> bool:
    """Whether work on so many rows runs on Ray: if that is chosen, or left to us and it is much or part of a job."""
    if runner != "auto":
        return runner == "ray"
    from jobs.ray_cluster.on_ray import is_a_job

    return rows >= RAY_FROM or is_a_job()


def start_runner(on_progress: OnProgress = ignore_progress, *, on_ray: bool) -> Literal["here", "ray"]:
    """The runner for the library. Connects to Ray, or starts it, if `on_ray`."""
    if not on_ray:
        return "here"
    on_progress(Progress("starting Ray", 0, None))
    from jobs.ray_cluster.on_ray import start_ray

    start_ray()
    return "ray"
