"""`forget MEMORY`: take entries out of every later answer, or out of every byte."""

import functools
import json as json_text
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.terminal.arguments import Json, Memory, command_line
from jobs.terminal.output import counted, note, print_json, printable, say, tell
from jobs.terminal.progress import progress
from jobs.terminal.runners import check_runner, is_for_ray, runner_option, start_runner
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.edits.erasure.receipt import Receipt
    from pipeline.edits.forget import ForgetPlan, ForgetReport

SHOWN = 5


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
    file: Annotated[
        str | None,
        typer.Option("--file", help="A list of ids or uris: one a line, or a column of a table.", metavar="PATH"),
    ] = None,
    erase: Annotated[
        bool, typer.Option("--erase", help="Also remove every byte of them, from all versions. Cannot be undone.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Look for them everywhere, and write a receipt of what was found.")
    ] = False,
    receipt: Annotated[
        str | None,
        typer.Option(
            "--receipt",
            help="Where the receipt goes, as .json and as .txt.  \\[default: receipt-VERSION here]",
            metavar="PATH",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many entries would go, and change nothing.")
    ] = False,
    runner: Annotated[str, runner_option("With --erase or --verify, work on the files", by_size=False)] = "auto",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Erase without asking, on a terminal too.")] = False,
    json: Json = False,
) -> None:
    """Forget the entries that any of the options names. Exit status 1 if a receipt was asked for and is not proven."""
    check_runner(runner)
    if dry_run and verify:
        raise typer.BadParameter("it changes nothing, so there is nothing to verify: leave out --verify, or it")
    if receipt is not None and not verify:
        raise typer.BadParameter("a receipt is written with --verify: add it", param_hint="--receipt")
    place = _place(memory, receipt or ".") if verify else None
    named: dict[str, Any] = {
        "ids": id or [], "uris": uri or [], "labels": label or [], "datasets": dataset or [], "file": file
    }  # fmt: skip
    if dry_run or (erase and not yes and _can_ask()):
        with progress("looking for the entries"):
            from pipeline import VisualMemory

            plan = VisualMemory(memory).plan_forget(erase=erase, **named)
        if dry_run:
            _show_plan(plan, json=json)
            return
        if not typer.confirm(f"{_intended(plan)}? This cannot be undone", err=True):
            note("nothing was changed")
            raise typer.Exit(1)
    with progress("looking for the entries") as on_progress:
        from pipeline import VisualMemory

        report = VisualMemory(memory).forget(
            **named,
            erase=erase,
            verify=verify,
            runner=start_runner(on_progress, on_ray=(erase or verify) and is_for_ray(runner)),
            command=command_line(memory),
            on_progress=on_progress,
        )
    files = _write(report.receipt, place, report.version) if report.receipt and place else []
    if json:
        print_json(report.to_json() | {"receipt_files": [str(path) for path in files]})
    else:
        _tell(report, files)
    _warn(report)
    if report.receipt and not report.receipt.proven:
        raise typer.Exit(1)


def _can_ask() -> bool:
    """Whether somebody sits there. A script is asked nothing, as it would have nobody to answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _show_plan(plan: "ForgetPlan", *, json: bool) -> None:
    if json:
        print_json(plan.to_json())
        return
    say(f"would {_intended(plan)}; nothing was changed")


def _intended(plan: "ForgetPlan") -> str:
    """What would be done: how many entries, of which labels and datasets."""
    labels = [f"{label} ({count:,})" for label, count in plan.labels.items()]
    labels += [f"none ({plan.unlabelled:,})"] if plan.unlabelled else []
    datasets = [f"{name} ({count:,})" for name, count in plan.datasets.items()]
    before = plan.entries - plan.forgotten
    already = f", {before:,} of them forgotten before" if before else ""
    verb = f"erase {counted(plan.entries, 'entry')} from every file and every version" if plan.erase else ""
    done = verb or f"forget {counted(plan.forgotten, 'entry')}"
    of_them = f"label {_some(labels)}; dataset {_some(datasets)}"
    return printable(f"{done}{already}: {of_them}", sys.stderr.encoding)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _tell(report: "ForgetReport", files: list[Path]) -> None:
    if report.erased is None:
        them = "it" if report.forgotten == 1 else "any of them"
        said = f"forgot {counted(report.forgotten, 'entry')}: no answer from version {report.version} on returns"
        say(f"{said} {them}")
    else:
        before = report.erased - report.forgotten
        of_them = f" ({before:,} of them forgotten before)" if before else ""
        said = f"erased {counted(report.erased, 'entry')}{of_them} from every file and every version"
        say(f"{said}; the memory is at version {report.version}")
    if report.receipt:
        proven = "proven" if report.receipt.proven else "NOT PROVEN, and it says why"
        about = "" if report.receipt.erased else " for answers; the bytes stay without --erase"
        say(f"receipt: {proven}{about}: {', '.join(map(str, files))}")


def _warn(report: "ForgetReport") -> None:
    if report.duplicates:
        shown = ", ".join(f"{each.id} ({each.uri})" for each in report.duplicates[:SHOWN])
        more = ", …" if len(report.duplicates) > SHOWN else ""
        verb = "stays, and has" if len(report.duplicates) == 1 else "stay, and have"
        note(f"{counted(len(report.duplicates), 'entry')} {verb} the uri or the bytes of an erased one: {shown}{more}")
    if report.index_dropped:
        note("an erased vector stood in the index as a centroid, so the index had to go: run `index` to build another")


def _place(memory: str, given: str) -> Path:
    """The path of a receipt without its suffix, or the folder it goes to. Raises UsageError where it cannot go."""
    local = given.removeprefix("file://")
    if "://" in local:
        raise UsageError(f"--receipt {given} is not on this machine: give a path")
    place = Path(local).expanduser().resolve()
    place = place.with_suffix("") if place.suffix in (".json", ".txt") and not place.is_dir() else place
    folder = place if place.is_dir() else place.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"a receipt cannot be written to {folder}: give --receipt a path in a folder of yours")
    if "://" not in memory.removeprefix("file://"):
        root = Path(memory.removeprefix("file://")).expanduser().resolve()
        if folder.is_relative_to(root):
            raise UsageError(
                f"a receipt names what was forgotten and cannot lie in the memory itself ({folder}): "
                "give --receipt a path outside of it"
            )
    return place


def _write(receipt: "Receipt", place: Path, version: int) -> list[Path]:
    """Write a receipt under names that are free; return them."""
    stem = place / f"receipt-{version}" if place.is_dir() else place
    texts = {
        ".json": json_text.dumps(receipt.to_json(), indent=1, ensure_ascii=False) + "\n",
        ".txt": receipt.to_text(),
    }
    number = 1
    while True:
        paths = {suffix: stem.with_name(f"{stem.name}{f'-{number}' * (number > 1)}{suffix}") for suffix in texts}
        if any(path.exists() for path in paths.values()):
            number += 1
            continue
        try:
            for suffix, path in paths.items():
                # Of its owner alone: it names what was erased.
                with open(path, "x", encoding="utf-8", opener=functools.partial(os.open, mode=0o600)) as stream:
                    stream.write(texts[suffix])
        except FileExistsError:  # another process has just taken the name
            number += 1
        except OSError:
            note("the receipt could not be written. This is what it says:")
            for line in texts[".txt"].splitlines():
                tell(line)
            raise
        else:
            return list(paths.values())
