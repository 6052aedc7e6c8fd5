"""Ray for a verb: the cluster that runs it as a job, the one in RAY_ADDRESS, or one of this machine alone."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UsageError

# Ray's switch, meant for other systems, that makes a cluster of this machine alone listen on 127.0.0.1. Otherwise its
# processes bind to every interface if the node has another address, even another one in 127.0.0.0/8.
ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LONGEST_TEMPORARY = 40  # characters of a folder; the paths of Ray's sockets add 60, and have a limit

USUAL_SHARE = 0.3  # of a CPU, reserved for each serving process


def is_a_job() -> bool:
    """Whether Ray started this process as a job of a cluster. RAY_ADDRESS then names that cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def start_ray() -> None:
    """Connect this process to Ray, or start Ray if there is no cluster. Ray's log output is limited to errors.

    Raises UsageError if RAY_ADDRESS is the address of a dashboard, which accepts jobs but no connections.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise UsageError(
            f"RAY_ADDRESS is {address}, where jobs are taken: submit the command, or add --runner here, or unset it"
        )
    set_defaults()
    import ray  # slow to import, and only large adds need it
    import ray.data

    from pipeline.resources import available_cpus

    for name in ("ray", "ray.data"):  # after the import, which sets these levels itself
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    with hold_back_stderr(), _deferred_interrupt():
        if address:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
            return
        ray.init(
            address="local",  # not a cluster that somebody else started on this machine
            num_cpus=available_cpus(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(own_folder() / "ray"),
        )


def own_folder() -> Path:
    """This user's folder for data that processes of this machine share or leave behind, such as Ray's logs.

    Nobody else may enter it, because everybody could change what Ray creates in it. Raises UsageError if somebody else
    owns it.
    """
    place = tempfile.gettempdir()
    folder = Path(place if len(place) <= LONGEST_TEMPORARY else "/tmp") / f"visual-memory-{os.getuid()}"  # noqa: S108
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UsageError(f"{folder} belongs to somebody else: have it removed, or name another place in TMPDIR")
    folder.chmod(0o700)
    return folder


def set_defaults() -> None:
    """Set environment variables that Ray reads at import, unless they are set already.

    A Ray started here always asks for a token, whatever RAY_AUTH_MODE says.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data's actors log a known, harmless error (ray#53727)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(ONE_MACHINE, "0")
        os.environ["RAY_AUTH_MODE"] = "token"
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # otherwise Ray would store a token where others may read it
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # otherwise a driver does not send the token
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no colours in a log file


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Delay Ctrl-C until Ray has started: an interrupt during startup crashes Ray's core (SIGSEGV)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def hold_back_stderr() -> Iterator[None]:
    """Hold back what Ray's C++ core prints while it starts, and show it only if starting fails.

    Output of this process itself, such as its progress, still goes to the original stderr.
    """
    sys.stderr.flush()
    kept, ours = os.dup(2), sys.stderr
    with tempfile.TemporaryFile() as held, open(kept, "w", buffering=1) as beside:
        os.dup2(held.fileno(), 2)
        if _is_stderr_itself():
            sys.stderr = beside
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr = ours
            os.dup2(kept, 2)


def _is_stderr_itself() -> bool:
    """Whether Python's stderr is the stderr of the process, not a replacement by a test or notebook."""
    try:
        return sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):
        return False


def is_on_cluster() -> bool:
    """Whether Ray is a cluster that runs already, rather than one of this machine alone."""
    return bool(os.environ.get("RAY_ADDRESS"))


def share_of_cpus(processes: int) -> float:
    """The fraction of a CPU to reserve for each process, so that all fit on this machine, even a laptop."""
    from pipeline.resources import available_cpus

    if is_on_cluster():
        return USUAL_SHARE
    return min(USUAL_SHARE, round(available_cpus() / processes - 0.005, 2))


def check_free(host: str, port: int) -> None:
    """Raises UsageError if a port is taken, or if an address is not one of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"{host}:{port} cannot be listened on ({error.strerror}): give another --port") from error
