"""A server on Ray from its start to its end: what it says meanwhile, and how it stops without losing an answer."""

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

from jobs.ray_cluster.on_ray import held_back_stderr, set_defaults, start_ray
from pipeline.errors import ClusterError

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

APPLICATION = "visual-memory"
_OUR_ERROR = re.compile(r"pipeline\.errors\.\w+: (.+)")
SECONDS_BETWEEN_LOOKS = 3.0  # at what is ready, while a server starts
DRAIN_LIMIT_SECONDS = 28.0  # a little more than an ingress takes at most


def serve_until_interrupted(
    build: Callable[[], "Application"],
    announce: Callable[[], None],
    proxies: dict | None,
    tell: Callable[[str], None],
) -> None:
    """Start Ray and Serve, deploy what `build` makes, announce it, and stop it all once this process is told to.

    `proxies` are the HTTP options of Serve's own proxies; None for an application that listens by itself. `tell` takes
    what is being done. Told to stop (SIGTERM, Ctrl-C), the application takes nothing new and answers what is under way;
    told again, it stops at once.
    """
    # Serve's own switches for throughput: half as many seconds again for a question (docs/benchmarks.md). Its direct
    # ingress, which they would turn on, is not needed where ours listens.
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
    # On a cluster a line of each request goes to Serve's log, at its level INFO.
    quiet = {"log_level": "WARNING" if proxies is None else "INFO", "enable_access_log": False}
    application: DeploymentHandle | None = None
    signals.take_over()
    try:
        location = "EveryNode" if proxies is not None else "Disabled"
        # An exception in the midst of this may abort the process in Ray's core: a signal waits until it is done.
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
    except (Stopped, KeyboardInterrupt):  # Ray's core says the latter of whatever a signal raises
        tell("stopping")
    finally:
        if application is not None:
            _drain(application, signals, tell)
        with held_back_stderr(), contextlib.redirect_stdout(io.StringIO()):
            # Ray remarks, on either, on processes that end while they are asked.
            if proxies is None:
                ray.shutdown()  # all of this Ray is ours: nothing is left to be told
            else:
                _leave_cluster()


def _first_failure() -> str | None:
    """What a replica said that could not start, without the traceback Serve puts around it; None where none did."""
    from ray import serve

    with contextlib.suppress(Exception):  # Serve is stopping: what it said at first is told
        for deployment in serve.status().applications[APPLICATION].deployments.values():
            for line in deployment.message.splitlines():
                if (found := _OUR_ERROR.search(line)) is not None:
                    return found[1].strip()
    return None


def _drain(application: "DeploymentHandle", signals: "StopSignals", tell: Callable[[str], None]) -> None:
    """Wait until every ingress has answered what is under way, or this process is told to stop once more."""
    import ray

    asked = _asking_to_drain(APPLICATION, DRAIN_LIMIT_SECONDS)
    drained = threading.Event()
    unanswered: list[int | Exception] = []

    def wait() -> None:
        try:
            if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
                # Handles do not work in a client: a process of the cluster asks instead.
                remote = ray.remote(num_cpus=0)(asked)
                unanswered.extend(ray.get(remote.remote(), timeout=DRAIN_LIMIT_SECONDS))
            else:
                unanswered.extend(asked(application))
        except Exception as error:  # a process that died answers nothing more, and the rest is stopped all the same
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
    """What asks every ingress how many requests it did not answer in time, or why that cannot be known.

    It is made here, and so travels to another process whole: what runs a client's tasks need not have this module.
    """

    def asked(application: "DeploymentHandle | None" = None) -> list[int | Exception]:
        import asyncio

        from ray import serve

        async def ask() -> list[int | Exception]:  # handles work within an event loop only, as Serve is set up here
            answers = (application or serve.get_app_handle(name)).broadcast("drain")
            found: list[int | Exception] = await answers.results_async(timeout_s=limit_seconds, return_exceptions=True)
            return found

        return asyncio.run(ask())

    return asked


def _leave_cluster() -> None:
    """Take the application off a cluster that others use too, and Serve with it if nothing else runs there."""
    import ray
    from ray import serve

    with contextlib.suppress(ray.exceptions.RayError, RuntimeError, TimeoutError):
        serve.delete(APPLICATION)
        if not serve.status().applications:
            serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


@contextlib.contextmanager
def _told_of_replicas(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell now and then how many processes of the application are ready."""
    from ray import serve

    done = threading.Event()

    def watch() -> None:
        last = ""
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(Exception):  # Serve is about to stop: there is nothing to tell
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
    """The process was told to stop while it was starting. No error: what retries after errors must let it pass."""


class StopSignals:
    """SIGTERM and SIGINT: noted, and raised as Stopped where something long is waited for."""

    def __init__(self) -> None:
        self._told = 0
        self._event = threading.Event()
        self._raising = False

    @property
    def told_twice(self) -> bool:
        return self._told > 1

    def wait(self) -> None:
        """Wait until the process is told to stop."""
        self._event.wait()

    def take_over(self) -> None:
        """Handle the signals from here on, whoever did before. Ray's own handler ends the process in its midst."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise Stopped once the process is told to stop, or was."""
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
    """Keep Ray from handling SIGTERM while it starts: it would end this process in its midst, or lose the signal."""
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
    """Take over the signals that stop a server, and give them back at the end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signals = StopSignals()
    signals.take_over()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
