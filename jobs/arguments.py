"""Arguments and options that several verbs share, and the values written in a way of our own ("16G", "ID=LABEL")."""

import re
from typing import Annotated, Literal

import typer

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_in_bytes(option: str, text: str) -> int:
    """The bytes that "16G", "500M" or "1024" name."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{option} {text} is not a size: write a number with K, M, G or T, such as 16G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def pair(text: str) -> tuple[int, str]:
    """The id and the value of "ID=VALUE"."""
    entry_id, equals, value = text.partition("=")
    if not equals or not value or not re.fullmatch(r"\d+", entry_id.strip()):
        raise typer.BadParameter(f"{text} is not ID=VALUE: `search` shows the ids of entries")
    return int(entry_id), value


def weights_by_id(pairs: list[str]) -> dict[int, float]:
    """What `--weigh ID=W`, given several times, says."""
    weights = {}
    for entry_id, value in map(pair, pairs):
        try:
            weights[entry_id] = float(value)
        except ValueError as error:
            raise typer.BadParameter(
                f"--weigh {entry_id}={value} is not a number: give a weight such as 0.5"
            ) from error
    return weights


def balance_value(text: str) -> float | Literal["auto"]:
    """What `--balance` says: a strength, or "auto"."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"--balance {text} is neither a number nor auto") from error


Memory = Annotated[str, typer.Argument(metavar="MEMORY", help="Folder of the memory.", show_default=False)]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of images, or one image.", show_default=False)]
Images = Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files to ask about.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
At = Annotated[int | None, typer.Option("--at", metavar="VERSION", help="Read this version instead of the newest.")]
Voting = Annotated[str, typer.Option("--voting", help="plurality, distance, softmax or rank.", metavar="VOTING")]
Balance = Annotated[
    str,
    typer.Option(
        "--balance",
        metavar="TAU|auto",
        help="Divide a class's votes by its number of entries to this power: 0 is none, 1 full, auto finds out.",
    ),
]
Exclude = Annotated[
    list[int] | None, typer.Option("--exclude", metavar="ID", help="What if this entry were not there? Repeatable.")
]
Weigh = Annotated[
    list[str] | None, typer.Option("--weigh", metavar="ID=W", help="What if this entry weighed W? Repeatable.")
]
Assume = Annotated[
    list[str] | None, typer.Option("--assume", metavar="ID=LABEL", help="What if it had this label? Repeatable.")
]
LabelSet = Annotated[
    str | None,
    typer.Option("--label-set", metavar="NAME", help="Use the labels of this label set.  \\[default: as stored]"),
]
AbstainBelow = Annotated[
    float, typer.Option("--abstain-below", metavar="P", help="Abstain when the winner's share is below this.")
]
