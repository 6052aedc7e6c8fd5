"""A server on Ray from start to end: what it prints meanwhile, and how it stops without losing an answer."""

import contextlib
import io
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from jobs.ray_cluster.on_ray import hold_back_stderr, set_defaults, start_ray
from pipeline.errors import ClusterError

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

APPLICATION = "visual-memory"
_OUR_ERROR = re.compile(r"pipeline\.errors\.\w+: (.+)")
SECONDS_BETWEEN_LOOKS = 3.0  # between checks of what is ready, while a server starts
DRAIN_LIMIT_SECONDS = 28.0  # a little more than an ingress takes at most


def serve_until_interrupted(
    build: Callable[[], "Application"],
    announce: Callable[[], None],
    proxies: dict | None,
    tell: Callable[[str], None],
) -> None:
    """Start Ray and Serve, deploy what `build` makes, announce it, and stop everything when a signal arrives.

    `proxies` are the HTTP options of Serve's own proxies; None for an application that listens by itself. `tell`
    receives a line for each step. At the first signal (SIGTERM, Ctrl-C) the application accepts nothing new and answers
    the requests under way. At a second signal it stops at once.
    """
    # Serve's own switches for throughput. Without them a question takes half as long again (docs/benchmarks.md). They
    # would also turn on Serve's direct ingress, which is not needed because ours listens itself.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")
    os.environ.setdefault("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(1 << 30))  # a batch of images is larger
    with stop_signals() as signals:
        tell("starting Ray" if not os.environ.get("RAY_ADDRESS") else "connecting to Ray")
        with _signals_left_alone():
            start_ray()
        _deploy_and_wait(build, announce, proxies, tell, signals)


def _deploy_and_wait(
    build: Callable[[], "Application"],
    announce: Callable[[], None],
    proxies: dict | None,
    tell: Callable[[str], None],
    signals: "StopSignals",
) -> None:
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # On a cluster Serve logs a line for each request at level INFO.
    quiet = {"log_level": "WARNING" if proxies is None else "INFO", "enable_access_log": False}
    application: DeploymentHandle | None = None
    signals.take_over()
    try:
        location = "EveryNode" if proxies is not None else "Disabled"
        # An exception during this call may abort the process in Ray's core: signals wait until it is done.
        serve.start(proxy_location=location, http_options=proxies, logging_config=quiet)
        with signals.raised():
            with _told_of_replicas(tell):
                try:
                    application = serve.run(build(), name=APPLICATION, logging_config=quiet)
                except RuntimeError as error:
                    said = _first_failure() or " ".join(str(error).split())
                    raise ClusterError(f"the server did not start ({said}): Ray's logs say more") from error
            announce()
        signals.wait()
        tell("stopping: answering what is under way; once more stops at once")
    except (Stopped, KeyboardInterrupt):  # Ray's core turns whatever a signal raises into the latter
        tell("stopping")
    finally:
        if application is not None:
            _drain(application, signals, tell)
        with hold_back_stderr(), contextlib.redirect_stdout(io.StringIO()):
            # Ray prints remarks, on stdout and stderr, about processes that end during calls to them.
            if proxies is None:
                ray.shutdown()  # this Ray is ours alone: nothing else needs to be undone
            else:
                _leave_cluster()


def _first_failure() -> str | None:
    """The error of a replica that could not start, without Serve's traceback; None if none reported one."""
    from ray import serve

    with contextlib.suppress(Exception):  # Serve may be stopping; the caller then uses its first error
        for deployment in serve.status().applications[APPLICATION].deployments.values():
            for line in deployment.message.splitlines():
                if (found := _OUR_ERROR.search(line)) is not None:
                    return found[1].strip()
    return None


def _drain(application: "DeploymentHandle", signals: "StopSignals", tell: Callable[[str], None]) -> None:
    """Wait until every ingress has answered the requests under way, or until the next signal."""
    import ray

    asked = _asking_to_drain(APPLICATION, DRAIN_LIMIT_SECONDS)
    drained = threading.Event()
    unanswered: list[int | Exception] = []

    def wait() -> None:
        try:
            if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
                # Handles do not work in a Ray client: a process of the cluster calls instead.
                remote = ray.remote(num_cpus=0)(asked)
                unanswered.extend(ray.get(remote.remote(), timeout=DRAIN_LIMIT_SECONDS))
            else:
                unanswered.extend(asked(application))
        except Exception as error:  # such as a process that died; the rest is stopped nevertheless
            unanswered.append(error)
        drained.set()

    threading.Thread(target=wait, daemon=True).start()
    limit = time.monotonic() + DRAIN_LIMIT_SECONDS
    while not drained.wait(0.05) and not signals.told_twice and time.monotonic() < limit:
        pass
    failed = [found for found in unanswered if isinstance(found, Exception)]
    if failed:
        tell(f"what was under way may not have been answered ({type(failed[0]).__name__})")
    elif not drained.is_set() or any(unanswered):
        tell("some requests were not answered any more")


def _asking_to_drain(name: str, limit_seconds: float) -> Callable[..., list[int | Exception]]:
    """A function that drains every ingress. It returns how many requests each did not answer in time, or the error.

    The function is defined here so that it is pickled by value: the process that runs a client's tasks may lack this
    module.
    """

    def asked(application: "DeploymentHandle | None" = None) -> list[int | Exception]:
        import asyncio

        from ray import serve

        async def ask() -> list[int | Exception]:  # with Serve's setup here, handles work only in an event loop
            answers = (application or serve.get_app_handle(name)).broadcast("drain")
            found: list[int | Exception] = await answers.results_async(timeout_s=limit_seconds, return_exceptions=True)
            return found

        return asyncio.run(ask())

    return asked


def _leave_cluster() -> None:
    """Remove the application from a shared cluster, and shut Serve down if it runs nothing else."""
    import ray
    from ray import serve

    with contextlib.suppress(ray.exceptions.RayError, RuntimeError, TimeoutError):
        serve.delete(APPLICATION)
        if not serve.status().applications:
            serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


@contextlib.contextmanager
def _told_of_replicas(tell: Callable[[str], None]) -> Iterator[None]:
    """Report from time to time how many deployments of the application are ready."""
    from ray import serve

    done = threading.Event()

    def watch() -> None:
        last = ""
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(Exception):  # Serve is about to stop: there is nothing to report
                deployments = serve.status().applications[APPLICATION].deployments
                ready = [name for name, found in deployments.items() if found.status == "HEALTHY"]
                waiting = sorted(set(deployments) - set(ready))
                line = f"{len(ready)} of {len(deployments)} parts are ready; starting {', '.join(waiting)}"
                if waiting and line != last and not done.is_set():
                    tell(line)
                    last = line

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        done.set()


class Stopped(BaseException):
    """A signal told the process to stop during startup. Not an Exception, so that code that retries lets it pass."""


class StopSignals:
    """Handles SIGTERM and SIGINT: records them, and raises Stopped during long waits."""

    def __init__(self) -> None:
        self._told = 0
        self._event = threading.Event()
        self._raising = False

    @property
    def told_twice(self) -> bool:
        return self._told > 1

    def wait(self) -> None:
        """Wait for a signal to stop."""
        self._event.wait()

    def take_over(self) -> None:
        """Install the handlers, replacing any others. Ray's own handler would end the process mid-work."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise Stopped in the block when a signal arrives, or if one has arrived."""
        self._raising = True
        try:
            if self._told:
                raise Stopped
            yield
        finally:
            self._raising = False

    def _note(self, *_: object) -> None:
        self._told += 1
        self._event.set()
        if self._raising:
            raise Stopped


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Keep Ray from handling SIGTERM while it starts: it would end this process, or lose the signal."""
    set_defaults()
    import ray._private.utils as rays_own

    original = rays_own.set_sigterm_handler
    rays_own.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        rays_own.set_sigterm_handler = original


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle the signals that stop a server, and restore the previous handlers at the end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signals = StopSignals()
    signals.take_over()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
