"""Rewrites messages of the library: parameters in backticks become options of the verb that was typed."""

import re
from collections.abc import Collection

# Parameters of the library whose option has another name.
_OPTIONS = {
    "ids": "--id",
    "uris": "--uri",
    "labels": "--label",
    "datasets": "--dataset",
    "exclude_files": "--exclude",
    "file_format": "--format",
    "max_memory_bytes": "--max-memory",
    "queries_per_second": "--qps",
}
INDEX_LIMITS = ("--max-memory", "--max-latency-ms", "--target-recall", "--key")  # of `index`, for a note of `add`
_PARAMETER = re.compile(r"(?<!run )`([a-z][a-z_]*)`")  # not a verb that the message says to run


def with_options(message: str, options: Collection[str]) -> str:
    """The message, with parameters replaced by the verb's options: `label_set` becomes --label-set."""

    def option(parameter: re.Match[str]) -> str:
        name = parameter[1]
        for written in (f"--{name.replace('_', '-')}", _OPTIONS.get(name)):
            if written in options:
                return str(written)
        return parameter[0]

    return _PARAMETER.sub(option, message)
