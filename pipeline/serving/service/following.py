"""Which version of a memory is answered by: newer ones are looked for, opened by every group, and gone over to.

A version is gone over to once a group has it open; else the one before goes on answering, unless an erasure was made
since. The groups are told, and say so in their answers, so that other ingresses go over before they answer again: what
was acknowledged to have been forgotten is in no answer of any of them. Everything here runs on one event loop; the
store is read by a thread that does nothing else.
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

POLLS_BEHIND = 10  # after which a version that is known and not open is told as a fault
SECONDS_OF_OVERLAYS = 30.0  # that a group may take to open a version of the same index; then the others go on
OPENING_SECONDS = 600.0  # that a version with another index may take, whose shards have to be fetched and read
LONGEST_PAUSE_SECONDS = 30.0  # between two tries to open a version that could not be opened

logger = plain_logger(__name__)


@dataclass
class _Behind:
    """A version that is known and not answered by, since when, and how the tries to open it went."""

    state: State
    edition: Edition
    since: float
    why: str = ""
    tries: int = 0
    not_before: float = 0.0


class Following:
    """The version that is answered by. `poll_seconds` is how often a newer one is looked for."""

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
        """Have the newest version opened, and follow the memory from then on. Raises MemoryMissing."""
        await self.refresh()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """Follow no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._reader.shutdown(wait=False)

    @property
    def state(self) -> State | None:
        """The version that is answered by; None before the first is open."""
        return self._state

    @property
    def edition(self) -> Edition:
        """The same, as groups know it."""
        return self._edition

    @property
    def newest(self) -> int:
        """The newest version that is known, whether or not it is answered by."""
        return self._behind.edition.version if self._behind is not None else self._edition.version

    @property
    def late(self) -> str | None:
        """Why answers are by an older version for longer than it should take to open the newest; None if they are not.

        A version with another index may take its time, for its shards have to be read.
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
        """Go over to the newest version, once a group has it open; return the number of the one that is answered by.

        Where another than `beyond` is answered by already, nothing is done. Where no group could open the newest,
        Unavailable is raised and the version before goes on answering, unless an erasure was made since. If not `asked`
        by anybody, what could not be opened is not tried again at once.
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
        self._members.go_on_to(behind.edition)
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
            except Exception as error:  # the store may be away: what is open still answers
                logger.warning("no newer version is answered by: %s", error)
