"""The command line: `visual-memory VERB …`, also `python -m jobs.cli VERB …`.

Errors the library knows become one sentence on stderr; exit status 1 when the work failed, 2 for wrong usage.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UsageError, VisualMemoryError

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

VERBS = (
    *("add", "index", "search", "classify", "explain", "evaluate", "forget", "relabel", "status", "verify"),
    *("compact", "history", "rollback", "expire", "copy", "export", "plan-capacity", "serve", "submit", "demo"),
)
PASSED_ON = {"ignore_unknown_options": True}  # the options of the verb that is submitted


def application() -> "typer.Typer":
    """The verbs. Loaded within `main`, so that an interrupt is told from the first moment on."""
    import typer

    app = typer.Typer(
        name="visual-memory",
        help="A classifier that is a database: remember images, ask, see the evidence, forget. "
        "Any verb takes --debug, which shows where an error came from.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for verb in VERBS:
        context = PASSED_ON if verb == "submit" else None
        name = verb.replace("-", "_")
        app.command(verb, context_settings=context)(getattr(importlib.import_module(f"jobs.{name}"), name))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb named by the arguments (None: the command line's) and exit with its status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries end in an error that says it all
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow remarks on damaged files is told as rejects
    try:
        arguments = [argument for argument in given if argument != "--debug"]
        app = application()
        _remember(arguments)
        app(args=arguments, prog_name="visual-memory")
    except SystemExit as ended:
        if ended.code == INTERRUPTED and type(ended) is SystemExit:  # `submit` tells of its end itself
            _tell_interrupted()
        raise
    except KeyboardInterrupt:
        _tell_interrupted()
        sys.exit(INTERRUPTED)
    except UsageError as error:
        _fail(error, debug, status_code=2)
    except VisualMemoryError as error:
        _fail(error, debug, status_code=1)
    except OSError as error:  # a full disk or a folder without the right to write, met while writing
        named = f" ({error.filename})" if error.filename else ""
        _fail(
            VisualMemoryError(f"{error.strerror or error}{named}: mend that and run the command again"), debug, 1, error
        )
    except Exception as error:  # what nobody foresaw is told in a line too; --debug shows the rest
        _fail(
            VisualMemoryError(f"this should not happen ({type(error).__name__}: {error}): --debug shows where"),
            debug,
            1,
            error,
        )


def _remember(arguments: Sequence[str]) -> None:
    """Keep what was typed for `command_line`, by which a version says how it came about."""
    from jobs.arguments import TYPED  # with typer, which takes a moment to load

    TYPED.set(arguments)


def _tell_interrupted() -> None:
    sys.stderr.write("note: interrupted: run the same command again; an add goes on where it was\n")


def _fail(error: Exception, debug: bool, status_code: int, cause: Exception | None = None) -> None:
    if debug:
        raise cause or error
    sys.stderr.write(f"error: {error}\n")
    sys.exit(status_code)


if __name__ == "__main__":
    main()
