"""Follows the versions of a memory: finds newer ones, has every group open them, and switches to them.

The service switches to a version once at least one group has opened it. Otherwise the previous version stays in use,
unless an erasure happened since. The groups are told of the switch and report it in their answers, so that other
ingresses switch before they answer again. So no ingress returns an entry whose forgetting was acknowledged. All code
here runs on one event loop; a dedicated thread reads the store.
"""

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.errors import Unavailable
from pipeline.plain_log import plain_logger
from pipeline.serving.service.group import Edition
from pipeline.serving.service.group_clients import Members
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.interface import Storage

POLLS_BEHIND = 10  # polls after which a version that is known but not open is reported as a fault
SECONDS_OF_OVERLAYS = 30.0  # for a group to open a version with the same index; then the others go on
OPENING_SECONDS = 600.0  # for a version with another index, whose shards must be fetched and read
LONGEST_PAUSE_SECONDS = 30.0  # between two tries to open a version that failed to open

logger = plain_logger(__name__)


@dataclass
class _Behind:
    """A known version that is not served yet: since when it is known, and the tries to open it."""

    state: State
    edition: Edition
    since: float
    why: str = ""
    tries: int = 0
    not_before: float = 0.0


class Following:
    """Tracks the served version. `poll_seconds` is the interval between checks for a newer one."""

    def __init__(self, storage: Storage, members: Members, poll_seconds: float) -> None:
        self._log = VersionLog(storage)
        self._members = members
        self._poll_seconds = poll_seconds
        self._state: State | None = None
        self._edition = Edition(0, "")
        self._behind: _Behind | None = None
        self._alone = asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, "following")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the newest version and begin to follow the memory. Raises MemoryMissing."""
        await self.refresh()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """Stop following the memory."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._reader.shutdown(wait=False)

    @property
    def state(self) -> State | None:
        """The state of the served version; None before the first version is open."""
        return self._state

    @property
    def edition(self) -> Edition:
        """The edition of the served version, as groups know it."""
        return self._edition

    @property
    def newest(self) -> int:
        """The number of the newest known version, served or not."""
        return self._behind.edition.version if self._behind is not None else self._edition.version

    @property
    def late(self) -> str | None:
        """Why an older version is served for longer than opening the newest should take; None if it is not.

        A version with another index may take longer, because its shards must be read.
        """
        behind = self._behind
        if behind is None or self._state is None:
            return None
        seconds = time.monotonic() - behind.since
        opening = behind.state.index != self._state.index and not behind.why
        if seconds <= (OPENING_SECONDS if opening else POLLS_BEHIND * self._poll_seconds):
            return None
        why = behind.why or "it is being opened"
        return (
            f"version {behind.edition.version} is known for {seconds:.0f} s and version {self._edition.version} answers"
            f" ({why})"
        )

    async def refresh(self, beyond: Edition | None = None, *, asked: bool = True) -> int:
        """Switch to the newest version once a group has opened it; returns the number of the served version.

        Does nothing if the served edition already differs from `beyond`. If no group can open the newest version,
        raises Unavailable and the previous version stays in use, unless an erasure happened since. If the call was not
        `asked` for by a client, a version that failed to open is retried only after a pause.
        """
        async with self._alone:
            if beyond is not None and beyond != self._edition:
                return self._edition.version
            loop = asyncio.get_running_loop()
            state, edition = await loop.run_in_executor(self._reader, self._read)
            if self._state is not None and edition == self._edition:
                self._behind = None
                return edition.version
            if self._behind is None or self._behind.edition != edition:
                self._behind = _Behind(state, edition, self._behind.since if self._behind else time.monotonic())
            if asked or time.monotonic() >= self._behind.not_before:
                await self._go_over(self._behind)
            return self._edition.version

    async def _go_over(self, behind: _Behind) -> None:
        began = time.monotonic()
        same_index = self._state is not None and behind.state.index == self._state.index
        errors = await self._members.prepare(behind.edition, SECONDS_OF_OVERLAYS if same_index else OPENING_SECONDS)
        failed = [error for error in errors if error is not None]
        erased = self._state is not None and not {*behind.state.erasures} <= {*self._state.erasures}
        if failed and len(failed) == len(errors) and not erased:
            if self._state is None:
                raise failed[0]
            pause = min(self._poll_seconds * 2**behind.tries, LONGEST_PAUSE_SECONDS)
            behind.tries, behind.not_before = behind.tries + 1, time.monotonic() + pause
            behind.why = "no group could open it"
            raise Unavailable(
                f"version {behind.edition.version} of the memory can be opened by no group, and version "
                f"{self._edition.version} goes on answering: the log of the groups says why"
            )
        await self._members.settle(behind.edition)
        self._members.go_on_to(behind.edition, erased=erased)
        self._state, self._edition, self._behind = behind.state, behind.edition, None
        logger.info("answers are by version %d after %.2f s", self._edition.version, time.monotonic() - began)

    def _read(self) -> tuple[State, Edition]:
        state = self._log.latest()
        return state, Edition(state.version, self._log.nonce_of(state.version))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self.refresh(asked=False)
            except Exception as error:  # the store may be unavailable: the open version still answers
                logger.warning("no newer version is answered by: %s", error)
