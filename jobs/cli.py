"""The command line: `visual-memory VERB …`, also `python -m jobs.cli VERB …`.

Errors of the library become one sentence on stderr. The exit status is 1 if the work failed, 2 for wrong usage.
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

INTERRUPTED = 130  # 128 + SIGINT, as in shells
BROKEN_PIPE = 141  # 128 + SIGPIPE

GROUPS = {  # the verbs, in the groups of the help
    "Remember": ("add", "index", "demo"),
    "Ask": ("classify", "explain", "search", "evaluate", "influence"),
    "Correct": ("suspects", "relabel", "forget", "rollback"),
    "Look": ("status", "history", "verify"),
    "Keep": ("compact", "expire", "copy", "export"),
    "Serve and scale": ("serve", "submit", "plan-capacity"),
}
VERBS = {verb: group for group, verbs in GROUPS.items() for verb in verbs}
PASSED_ON = {"ignore_unknown_options": True}  # options of the submitted verb pass through


def application(verbs: Iterable[str] = VERBS) -> "typer.Typer":
    """The application with these verbs. `main` imports them, so that it catches an interrupt from the start."""
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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries end in an error that explains everything
    warnings.filterwarnings("ignore", module="PIL")  # Pillow's warnings about damaged files are reported as rejects
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
    except BrokenPipeError:  # the reader, such as `head`, has ended
        _close_stdout()
        sys.exit(BROKEN_PIPE)
    except UsageError as error:
        _fail(error, debug, status_code=2, verb=given[:1])
    except VisualMemoryError as error:
        _fail(error, debug, status_code=1, verb=given[:1])
    except OSError as error:  # such as a full disk, or a folder without write permission
        named = f" ({error.filename})" if error.filename else ""
        _fail(
            VisualMemoryError(f"{error.strerror or error}{named}: mend that and run the command again"), debug, 1, error
        )
    except Exception as error:  # unexpected errors become a line too; --debug shows the traceback
        if _comes_of_an_interrupt(error):
            _tell_interrupted()
            sys.exit(INTERRUPTED)
        from pipeline.foreign_errors import own_error  # imports Arrow, which takes a moment

        own = own_error(error, given[0] if given else "this command")
        if own is not None:
            _fail(own, debug, 1, error)
        _fail(
            VisualMemoryError(f"this should not happen ({type(error).__name__}: {error}): --debug shows where"),
            debug,
            1,
            error,
        )


def _remember(arguments: Sequence[str]) -> None:
    """Store the typed command for `command_line`, so that a version can record where it came from."""
    from jobs.terminal.arguments import TYPED  # imports typer, which takes a moment

    TYPED.set(arguments)


def _let_anything_be_written() -> None:
    """Escape characters that the encoding of stdout or stderr lacks, so that no label stops a verb."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the parent closed it, as cron jobs and services may
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(ended: SystemExit) -> NoReturn:
    """Exit as the verb asked to, after flushing stdout."""
    if ended.code == INTERRUPTED and type(ended) is SystemExit:  # `submit` prints its own message
        _tell_interrupted()
    if not _flushed():
        sys.exit(BROKEN_PIPE)
    raise ended


def _flushed() -> bool:
    """Whether all output reached its reader. The interpreter would report the rest as an error at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
        return False
    return True


def _close_stdout() -> None:
    """Discard further output to a pipe without a reader, even when the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_interrupted() -> None:
    sys.stderr.write("note: interrupted: run the same command again; an add, a copy, or a run with --out goes on\n")


def _comes_of_an_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error: a C module turns it into an error of its own while it loads."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "ArrowCancelled":
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
    """The options of a verb, such as --label-set."""
    if not set(verb) <= set(VERBS):
        return set()
    from typer.main import get_command

    command = get_command(application(verb))
    commands = getattr(command, "commands", {"": command})
    return {option for each in commands.values() for parameter in each.params for option in parameter.opts}


if __name__ == "__main__":
    main()
