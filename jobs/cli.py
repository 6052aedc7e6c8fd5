"""The command line: `visual-memory VERB …`, also `python -m jobs.cli VERB …`.

Errors the library knows become one sentence on stderr; exit status 1 when the work failed, 2 for wrong usage.
"""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, NoReturn

from pipeline.errors import UsageError, VisualMemoryError
from pipeline.extras import needed_for

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE

GROUPS = {  # the verbs as the help shows them
    "Remember": ("add", "index", "demo"),
    "Ask": ("classify", "explain", "search", "evaluate"),
    "Correct": ("relabel", "forget", "rollback"),
    "Look": ("status", "history", "verify"),
    "Keep": ("compact", "expire", "copy", "export"),
    "Serve and scale": ("serve", "submit", "plan-capacity"),
}
VERBS = {verb: group for group, verbs in GROUPS.items() for verb in verbs}
PASSED_ON = {"ignore_unknown_options": True}  # the options of the verb that is submitted


def application(verbs: Iterable[str] = VERBS) -> "typer.Typer":
    """The verbs. Loaded within `main`, so that an interrupt is told from the first moment on."""
    import typer

    from jobs.terminal.verb import Verb, Verbs

    app = typer.Typer(
        name="visual-memory",
        cls=Verbs,
        help="A classifier that is a database: remember images, ask, see the evidence, forget. "
        "Any verb takes --debug, which shows where an error came from.",
        subcommand_metavar="VERB ...",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", callback=_tell_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    for verb in verbs:
        context = PASSED_ON if verb == "submit" else None
        name = verb.replace("-", "_")
        run = getattr(importlib.import_module(f"jobs.{name}"), name)
        app.command(verb, cls=Verb, context_settings=context, rich_help_panel=VERBS[verb])(run)
    return app


def _tell_version(asked: bool) -> None:
    if not asked:
        return
    import typer

    import pipeline

    sys.stdout.write(f"visual-memory {pipeline.__version__}\n")
    raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb named by the arguments (None: the command line's) and exit with its status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries end in an error that says it all
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow remarks on damaged files is told as rejects
    try:
        arguments = [argument for argument in given if argument != "--debug"]
        _let_anything_be_written()
        app = application([arguments[0]] if arguments and arguments[0] in VERBS else VERBS)
        _remember(arguments)
        with needed_for(f"`{arguments[0]}`" if arguments else "this"):
            app(args=arguments, prog_name="visual-memory")
    except SystemExit as ended:
        _end(ended)
    except KeyboardInterrupt:
        _tell_interrupted()
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read, such as `head`, has seen enough
        _close_stdout()
        sys.exit(BROKEN_PIPE)
    except UsageError as error:
        _fail(error, debug, status_code=2, verb=given[:1])
    except VisualMemoryError as error:
        _fail(error, debug, status_code=1, verb=given[:1])
    except OSError as error:  # a full disk or a folder without the right to write, met while writing
        named = f" ({error.filename})" if error.filename else ""
        _fail(
            VisualMemoryError(f"{error.strerror or error}{named}: mend that and run the command again"), debug, 1, error
        )
    except Exception as error:  # what nobody foresaw is told in a line too; --debug shows the rest
        if _comes_of_an_interrupt(error):
            _tell_interrupted()
            sys.exit(INTERRUPTED)
        _fail(
            VisualMemoryError(f"this should not happen ({type(error).__name__}: {error}): --debug shows where"),
            debug,
            1,
            error,
        )


def _remember(arguments: Sequence[str]) -> None:
    """Keep what was typed for `command_line`, by which a version says how it came about."""
    from jobs.terminal.arguments import TYPED  # with typer, which takes a moment to load

    TYPED.set(arguments)


def _let_anything_be_written() -> None:
    """A label that the encoding of stdout lacks is escaped, and ends no verb."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this, as cron jobs and services may
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(ended: SystemExit) -> NoReturn:
    """End as a verb asked to, with nothing left to be written."""
    if ended.code == INTERRUPTED and type(ended) is SystemExit:  # `submit` tells of its end itself
        _tell_interrupted()
    if not _flushed():
        sys.exit(BROKEN_PIPE)
    raise ended


def _flushed() -> bool:
    """Whether all that was written reached its reader: the interpreter would complain of the rest when it ends."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
        return False
    return True


def _close_stdout() -> None:
    """Have nothing more written to a pipe that nobody reads, not even when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_interrupted() -> None:
    sys.stderr.write("note: interrupted: run the same command again; an add goes on where it was\n")


def _comes_of_an_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: a module of C that is being loaded turns it into one of its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(
    error: Exception, debug: bool, status_code: int, cause: Exception | None = None, verb: Sequence[str] = ()
) -> None:
    if debug:
        raise cause or error
    from jobs.terminal.options import with_options
    from jobs.terminal.output import printable

    said = with_options(str(error), _options_of(verb))
    sys.stderr.write(printable(f"error: {said}", sys.stderr.encoding) + "\n")
    sys.exit(status_code)


def _options_of(verb: Sequence[str]) -> set[str]:
    """The options that a verb has, such as --label-set."""
    if not set(verb) <= set(VERBS):
        return set()
    from typer.main import get_command

    command = get_command(application(verb))
    commands = getattr(command, "commands", {"": command})
    return {option for each in commands.values() for parameter in each.params for option in parameter.opts}


if __name__ == "__main__":
    main()
