"""Identifies a process, so that another process can check whether it is alive, without trusting any clock."""

import functools
import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

_STARTED_FIELD = 19  # of /proc/PID/stat, counted after the name in brackets: field 22 in proc(5)


class Process(BaseModel):
    """One process of one machine.

    `pid` is valid within `namespace`. `started`, in ticks since boot, distinguishes two processes with the same number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    namespace: str
    pid: int = Field(gt=0, lt=1 << 31)
    started: str

    @classmethod
    def this(cls) -> "Process":
        """The calling process."""
        return _this(os.getpid())

    def is_alive(self) -> bool | None:
        """Whether it still runs; None if that is unknown, as it is on another machine or in another container."""
        here = Process.this()
        if (self.host, self.namespace) != (here.host, here.namespace):
            return None
        if self.started and _started(self.pid) != self.started:
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # OverflowError: a number that no process has
            return False
        except PermissionError:
            pass
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@functools.lru_cache(maxsize=1)  # called for every file written; a fork has another pid
def _this(pid: int) -> Process:
    return Process(host=socket.gethostname(), namespace=_namespace(), pid=pid, started=_started(pid))


def _namespace() -> str:
    """The pid namespace and the boot id; "host" if there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.readlink('/proc/self/ns/pid')} {boot}"
    except OSError:
        return "host"


def _started(pid: int) -> str:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    if after_name[0] in "ZX":  # dead, but its parent has not waited for it yet
        return ""
    return after_name[_STARTED_FIELD]
