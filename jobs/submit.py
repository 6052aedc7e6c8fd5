"""`submit VERB …`: the same verb as a Ray job on a cluster, its log followed from here.

The cluster needs what pyproject.toml lists as dependencies, and `python` on its nodes' PATH that finds them; our own
two packages travel with the job. Memory and source must be places that the cluster's nodes see.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from jobs.ray_cluster.job_log import JobLog
from jobs.terminal.output import note, print_json, say, tell
from jobs.terminal.progress import progress
from pipeline.errors import ClusterError, UsageError

if TYPE_CHECKING:
    import click

PLACES = ("URI", "FILE", "FOLDER", "DIR", "PATH")  # what the values of options are called that are paths
SHIPPED = ("pipeline", "jobs")
NOT_REMOTE = {
    "submit": "submit is for this machine: name the verb that the cluster is to run",
    "serve": "serve answers for as long as it runs, and a job's ports are not to be found: run it on a node",
    "demo": "demo is a tour of this machine: run it here",
}
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
LOST_SECONDS = 60.0  # for as long a lost connection is tried again: a load balancer or the head may be restarting
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 8.0


def submit(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="VERB ...", help="The verb, with its arguments and options.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="URL", help="The cluster's dashboard.  \\[default: RAY_ADDRESS]", show_default=False
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="Pass this environment variable on to the job. Repeatable."),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the log.")] = False,
    attach: Annotated[
        str | None, typer.Option("--attach", metavar="JOB", help="Follow a job that was submitted before.")
    ] = None,
    stop: Annotated[
        str | None, typer.Option("--stop", metavar="JOB", help="Stop a job; an add goes on when submitted again.")
    ] = None,
) -> None:
    """Run VERB as a job on a Ray cluster, follow its log and exit with its status. Ctrl-C leaves the job running.

    URL is where the cluster's dashboard is, such as http://HOST:8265. A token is taken from RAY_AUTH_TOKEN. With --json
    among the verb's options the log goes to stderr, the document to stdout.
    """
    words = words or []
    if [bool(words), attach is not None, stop is not None].count(True) != 1:
        raise typer.BadParameter("give a VERB with its arguments, or one of --attach JOB and --stop JOB")
    if not words and (env or no_wait):
        raise typer.BadParameter("--env and --no-wait are for a VERB that is submitted")
    url = _url(address)
    if words:
        _check(words)
        environment = _environment(env or [])
    with progress("connecting to the cluster"):
        jobs = _Jobs(url)
    if stop is not None:
        stopped = jobs.stop(stop)
        say(f"{stop} was asked to stop" if stopped else f"{stop} had ended before")
        return
    job = attach
    if job is None:
        with progress("submitting"):
            job = jobs.submit(words, environment)
        if no_wait:
            if "--json" in words:
                print_json({"job": job, "address": url})
            else:
                say(f"submitted as {job}; {_come_back(job, url)}")
            return
        note(f"submitted as {job}: Ctrl-C leaves it running")
    _follow(jobs, job, url, json="--json" in words if words else jobs.prints_json(job))


def _follow(jobs: "_Jobs", job: str, url: str, *, json: bool) -> NoReturn:
    log = JobLog(_to(sys.stdout), _to(sys.stderr), json=json)
    try:
        status = jobs.follow(job, log)
    except KeyboardInterrupt:
        log.end()
        note(f"{job} goes on without this terminal; {_come_back(job, url)}")
        raise _Ended(INTERRUPTED) from None
    except ClusterError as error:
        log.end()
        raise ClusterError(f"{error}; {_come_back(job, url)}") from error
    raise _Ended(status)


class _Ended(SystemExit):
    """The end of a verb that has said all there is to say."""


def entry_point(words: Sequence[str]) -> str:
    """The command line that a shell of the cluster runs."""
    return shlex.join(["python", "-m", "jobs.cli", *words])


@contextlib.contextmanager
def shipped_files() -> Iterator[Path]:
    """A folder with copies of our packages as they are installed here, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="visual-memory-") as name:
        for package in SHIPPED:
            found = importlib.util.find_spec(package)
            assert found is not None  # noqa: S101  # this module is in one of them
            assert found.submodule_search_locations is not None  # noqa: S101
            [folder] = found.submodule_search_locations
            shutil.copytree(folder, Path(name, package), ignore=shutil.ignore_patterns("__pycache__", ".*"))
        yield Path(name)


def _check(words: Sequence[str]) -> None:
    """Refuse here what the job would refuse, and what cannot mean the same there."""
    verb, *arguments = words
    if verb in NOT_REMOTE:
        raise UsageError(NOT_REMOTE[verb])
    for name, text in _places(verb, arguments):
        if "://" in text:
            continue
        if not os.path.isabs(text):
            raise UsageError(
                f"{name} {text} is a relative path, which leads elsewhere on a cluster: give a URI such as "
                "s3://BUCKET/FOLDER, or the whole path in a file system that all nodes share"
            )
    for word in arguments:
        path = word.partition("=")[2] if word.startswith("-") else word
        if path and "://" not in path and os.path.exists(path):
            note(f"{path} is on this machine: the cluster finds it only in a file system that all its nodes share")


def _places(verb: str, arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The arguments and options of a verb that are paths or URIs, by name. Exits with status 2 on wrong usage."""
    from jobs.cli import application

    group: Any = typer.main.get_command(application())
    command: click.Command | None = group.commands.get(verb)
    if command is None:
        raise UsageError(f"{verb} is no verb: visual-memory --help lists them")
    context = command.make_context(f"visual-memory {verb}", list(arguments))
    for parameter in command.params:
        value = context.params.get(parameter.name or "")
        is_option = parameter.param_type_name == "option"
        if value is None or (is_option and parameter.metavar not in PLACES):
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, (str, Path)):
                yield parameter.opts[0] if is_option else parameter.metavar or str(parameter.name), str(each)


def _url(address: str | None) -> str:
    url = address or os.environ.get("RAY_ADDRESS", "")
    if not url:
        raise UsageError("submit needs --address URL: that of the cluster's dashboard, such as http://HOST:8265")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url} is not the address of a cluster's dashboard: give one such as http://HOST:8265")
    return url.rstrip("/")


def _environment(names: Sequence[str]) -> dict[str, str]:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UsageError(f"--env {missing[0]}: there is no such variable in this environment (give its name, no value)")
    return {name: os.environ[name] for name in names}


def _come_back(job: str, url: str) -> str:
    return f"follow it: visual-memory submit --attach {job} --address {url}; stop it: the same with --stop {job}"


def _to(stream: Any) -> Any:
    def tell(text: str) -> None:
        stream.write(text)
        stream.flush()

    return tell


class _Lost(Exception):
    """The connection failed, or the server did; it may come back."""


class _Jobs:
    """The jobs of one cluster. What goes wrong is a ClusterError."""

    def __init__(self, url: str) -> None:
        self._url = url
        if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # a client does not send it otherwise
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with _environment_says("RAY_API_SERVER_ADDRESS", url), self._told():  # RAY_ADDRESS would overrule the argument
            self._client = JobSubmissionClient(url)

    def submit(self, words: Sequence[str], environment: dict[str, str]) -> str:
        """Ship our packages and start the verb; the job's name."""
        job = f"{words[0]}-{secrets.token_hex(4)}"
        with shipped_files() as folder, self._told():
            runtime_env = {"working_dir": str(folder), "env_vars": environment}
            self._client.submit_job(entrypoint=entry_point(words), submission_id=job, runtime_env=runtime_env)
        return job

    def prints_json(self, job: str) -> bool:
        """Whether its verb was asked for a document."""
        with self._told(job):
            return "--json" in (self._client.get_job_info(job).entrypoint or "").split()

    def stop(self, job: str) -> bool:
        """Whether there was something to stop."""
        with self._told(job):
            return bool(self._client.stop_job(job))

    def follow(self, job: str, log: JobLog) -> int:
        """Pass the job's log on until it ends; its exit status."""
        pause, lost_since = FIRST_PAUSE_SECONDS, None
        seen = -1
        while True:
            try:
                with self._told(job, passing=True):
                    info = self._client.get_job_info(job)  # asked first: the log of an unknown job never begins
                    log.reopen()
                    asyncio.run(self._copy_log(job, log))
                    info = self._client.get_job_info(job)
            except _Lost as lost:
                now = time.monotonic()
                if lost_since is None or log.length > seen:
                    lost_since, seen, pause = now, log.length, FIRST_PAUSE_SECONDS
                if now - lost_since > LOST_SECONDS:
                    raise ClusterError(f"the cluster at {self._url} was lost sight of ({lost})") from lost
            else:
                lost_since = None
                if info.status.is_terminal():
                    log.end()
                    return self._status(job, info)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _copy_log(self, job: str, log: JobLog) -> None:
        async for text in self._client.tail_job_logs(job):
            log.write(text)

    def _status(self, job: str, info: Any) -> int:
        code: int | None = info.driver_exit_code
        if code is not None:
            return code if code >= 0 else 128 - code  # killed by a signal, as shells have it
        if info.status == "SUCCEEDED":
            return 0
        reason = _first_line(info.message) or "no reason is given"
        say_why = note if info.status == "STOPPED" else lambda text: tell(f"error: {text}")
        say_why(f"{job} was {str(info.status.value).lower()}: {reason}")
        return 1

    @contextlib.contextmanager
    def _told(self, job: str = "", *, passing: bool = False) -> Iterator[None]:
        """Tell what Ray's client raises in a sentence; with `passing`, what may pass as _Lost."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"the cluster at {self._url} refuses the token: set RAY_AUTH_TOKEN to the one that its nodes were "
                "started with"
            ) from error
        except (requests.RequestException, aiohttp.ClientError, OSError, RuntimeError, ValueError) as error:
            text = str(error)
            if job and ("status code 404" in text or "status=404" in text or "404," in text):
                raise ClusterError(f"the cluster at {self._url} knows no job {job}") from error
            if passing:
                raise _Lost(_last_line(text) if type(error) is RuntimeError else "nothing answers") from error
            if isinstance(error, (requests.RequestException, OSError)):
                raise ClusterError(
                    f"no Ray job server answers at {self._url}: give the address of the cluster's dashboard"
                ) from error
            raise ClusterError(f"the cluster at {self._url} did not take it: {_last_line(text)}") from error


@contextlib.contextmanager
def _environment_says(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _first_line(text: str | None) -> str:
    return next(iter((text or "").strip().splitlines()), "")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason is given"])[-1]
