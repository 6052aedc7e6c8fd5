"""Arguments and options that several verbs share, and parsers of their own notations ("16G", "ID=LABEL")."""

import contextvars
import datetime
import inspect
import re
import shlex
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

import typer

TYPED: contextvars.ContextVar[Sequence[str]] = contextvars.ContextVar("TYPED", default=())  # the current command line

MAX_COMMAND = 1_000  # characters of a command that a version records
_UNSAID = {"--json", "--debug"}  # these do not change what is done
_SECRET = {"--weights", "--token"}  # the value that follows may contain credentials
_AGES = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_in_bytes(option: str, text: str) -> int:
    """The number of bytes in "16G", "500M" or "1024"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{option} {text} is not a size: write a number with K, M, G or T, such as 16G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def count(text: str | int) -> int:
    """The number in "200M", "1.5K", "1e9" or "50,000"; a parser for options that count something."""
    found = re.fullmatch(
        r"([+-]?(?:\d+|\d{1,3}(?:[,_]\d{3})+)(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([KMGBT]?)",
        str(text).strip(),
        re.IGNORECASE | re.ASCII,
    )
    number = Decimal(re.sub("[,_]", "", found[1])) * _THOUSANDS[found[2].upper()] if found else None
    if number is None or number != int(number):
        raise typer.BadParameter(f"{text} is not a whole number: write 50000, 200K, 200M or 1B")
    return int(number)


def count_or_all(text: str | int) -> int | Literal["all"]:
    """The number in "20K", or "all"; a parser for options that take a part of something."""
    return "all" if text == "all" else count(text)


def command_line(memory: str) -> str:
    """The typed command, as a version records it: the verb and its arguments, without MEMORY and secrets."""
    words = list(TYPED.get())
    if memory in words[1:]:
        words.pop(words.index(memory, 1))
    said: list[str] = []
    length = 0
    while words:
        word = words.pop(0)
        if word.partition("=")[0] in _SECRET:
            words = words if "=" in word else words[1:]
        elif word not in _UNSAID:
            # A URI may contain a password before the host, or a signature after the path.
            open_part = re.sub(r"(?<=://)[^/@]*@|(?<=\S)\?.*$", "", word) if "://" in word else word
            said.append(shlex.quote(open_part))
            length += len(said[-1]) + 1
        if length > MAX_COMMAND:
            return " ".join([*said[:-1], "…"])
    return " ".join(said)


def age_or_count(option: str, text: str) -> datetime.timedelta | int:
    """The age in "30d" (units s, m, h, d and w), or the number of versions in "100" or "100v"."""
    found = re.fullmatch(r"(\d+)\s*([smhdwv]?)", str(text).strip())
    try:
        if found and found[2] in _AGES:
            return datetime.timedelta(**{_AGES[found[2]]: int(found[1])})
        if found:
            return int(found[1])
    except OverflowError as error:
        raise typer.BadParameter(f"{option} {text} is longer ago than any clock tells") from error
    raise typer.BadParameter(
        f"{option} {text} is neither an age nor a number of versions: write 30d (or s, m, h, w), or 100"
    )


def pair(text: str) -> tuple[int, str]:
    """The id and the value of "ID=VALUE"."""
    entry_id, equals, value = text.partition("=")
    if not equals or not value or not re.fullmatch(r"\d+", entry_id.strip()):
        raise typer.BadParameter(f"{text} is not ID=VALUE: `search` shows the ids of entries")
    return int(entry_id), value


def weights_by_id(pairs: list[str]) -> dict[int, float]:
    """The weights that repeated `--weigh ID=W` give, by id."""
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
    """The value of `--balance`: a strength, or "auto"."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"--balance {text} is neither a number nor auto") from error


Memory = Annotated[str, typer.Argument(metavar="MEMORY", help="Folder or URI of the memory.", show_default=False)]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder or URI with images, tar archives, Parquet files or vectors (.npy); or one of these; or a list of "
        "uris (CSV, Parquet, or the manifest.json of an S3 Inventory).",
        show_default=False,
    ),
]
LabelsFrom = Annotated[
    str,
    typer.Option(
        "--labels",
        help="folder: the first folder below SOURCE, or what lies beside the images in archives and tables; parent: "
        "the folder that holds the image; none; a column of Parquet files, or of the JSON in tars; a file that names "
        "images and their labels.",
        metavar="folder|parent|none|column:NAME|file:PATH",
    ),
]
ExcludeFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        help="Pass over files and folders like this, as .gitignore has it: 'masks', '*_seg.png', 'a/**/b'. Repeatable.",
        metavar="GLOB",
    ),
]
ImageExtension = Annotated[
    str | None,
    typer.Option(
        "--image-extension",
        help="In tar archives, take only the images with this ending after the name of their sample, such as jpg.",
        metavar="EXTENSION",
    ),
]
Images = Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files to ask about.", show_default=False)]
Neighbors = Annotated[int, typer.Option("-k", "--k", help="How many neighbours vote.", metavar="K", parser=count)]
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
Where = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="EXPR",
        help="Ask only the entries of which this holds, such as \"camera = 'Canon' and year >= 2020\".",
    ),
]
AbstainBelow = Annotated[
    float, typer.Option("--abstain-below", metavar="P", help="Abstain when the winner's share is below this.")
]


# The options of a question, in the order of the help.
_QUESTION: dict[str, tuple[Any, Any]] = {
    "k": (Neighbors, 50),
    "voting": (Voting, "rank"),
    "label_set": (LabelSet, None),
    "where": (Where, None),
    "exclude": (Exclude, None),
    "weigh": (Weigh, None),
    "assume": (Assume, None),
    "balance": (Balance, "0"),
    "abstain_below": (AbstainBelow, 0.0),
}


def with_question(verb: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `question` of a verb by the options of a question, and pass it one Question."""

    def asked(**given: Any) -> None:
        from pipeline.decisions.question import Question

        said = {name: given.pop(name) for name in _QUESTION}
        said["exclude"] = said["exclude"] or []
        said["weigh"] = weights_by_id(said["weigh"] or [])
        said["assume"] = dict(map(pair, said["assume"] or []))
        said["balance"] = balance_value(said["balance"])
        verb(question=Question(**said), **given)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        if parameter.name == "question":
            kind = inspect.Parameter.KEYWORD_ONLY
            options = _QUESTION.items()
            parameters += [inspect.Parameter(name, kind, default=usual, annotation=a) for name, (a, usual) in options]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    asked.__name__, asked.__doc__, asked.__module__ = verb.__name__, verb.__doc__, verb.__module__
    asked.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer reads this
    asked.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return asked
