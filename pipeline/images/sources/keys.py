"""The keys below a prefix of a store, listed with several requests at once.

A prefix is divided at its folders if these are large. A prefix of many small folders is listed from end to end, because
one request gives a thousand keys, and a folder of its own takes at least one. Keys directly in one folder come in one
request after another: only the answer to one says where the next begins. Nothing here depends on the order in which a
store lists. Keys come in stretches, and the caller puts them in order.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from pipeline.images.names.uris import uri_of_path

REQUESTS_AT_ONCE = 16
HELD_KEYS = 1 << 17  # that wait for their turn, 0.4 KB each; if there are more, all are given out
LARGE_FOLDER = 250  # keys: a request for a folder of fewer brings less than a quarter of what it could

Key = tuple[str, dict[str, Any]]


class Page(NamedTuple):
    """One answer of a store: keys with what it says of them, folders with their slash, and the token of the next page.

    The token is None on the last page.
    """

    keys: list[Key]
    folders: list[str]
    token: str | None


class Pages(Protocol):
    """The requests to a store. One without `can_list_deep` lists a folder at a time."""

    can_list_deep: bool
    requests_at_once: int

    def list_folder(self, prefix: str, token: str | None) -> Page:
        """The keys and folders directly below a prefix."""

    def list_deep(self, prefix: str, token: str | None) -> Page:
        """The keys below a prefix at any depth, and no folders."""


class Stretch(NamedTuple):
    """Keys of one place in the order of the store. Stretches of a place have its number, and follow each other."""

    place: int
    keys: list[Key]


@dataclass
class _Place:
    """A folder, or the keys between two folders. Places are linked in the order of the keys."""

    number: int
    prefix: str
    keys: list[Key] = field(default_factory=list)
    is_done: bool = False
    next: "_Place | None" = None


@dataclass(frozen=True)
class _Request:
    """The next page of a place. `first` is a folder's first page, held until its folders are known to be large.

    In a folder that is divided, `last` is the place behind which the next page's places are put.
    """

    place: _Place
    token: str | None = None
    is_deep: bool = False
    first: Page | None = None
    last: _Place | None = None


class KeyWalk:
    """A walk through the keys below a prefix ("" or with its slash). Requests are made while it is iterated.

    `enters` decides whether a folder is listed. Costs a request for each thousand keys, at most four times as many if
    the folders have some hundred keys, and one for each folder if only the first ones are large. Memory holds HELD_KEYS
    keys and a page for each of the requests at once. Raises what the store raises.
    """

    def __init__(self, pages: Pages, prefix: str, enters: Callable[[str], bool]) -> None:
        self.num_requests = 0
        self._pages = pages
        self._enters = enters
        self._numbers = itertools.count()
        self._head: _Place | None = self._new_place(prefix)
        self._num_held = 0
        self._next: list[tuple[str, int, _Request]] = []  # a heap: the first in the order of keys is asked first
        self._running: dict[Future[Page], _Request] = {}
        self._ask(_Request(self._head), prefix)

    def __iter__(self) -> Iterator[Stretch]:
        pool = ThreadPoolExecutor(self._pages.requests_at_once, thread_name_prefix="listing")
        try:
            self._send(pool)
            while self._running:
                done, _ = wait(self._running, return_when=FIRST_COMPLETED)
                for future in done:
                    self._take(self._running.pop(future), future.result())
                self._send(pool)  # the store is at work while the caller is
                yield from self._given_out()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _new_place(self, prefix: str) -> _Place:
        return _Place(next(self._numbers), prefix)

    def _ask(self, request: _Request, where: str) -> None:
        heapq.heappush(self._next, (uri_of_path(where), next(self._numbers), request))

    def _send(self, pool: ThreadPoolExecutor) -> None:
        while self._next and len(self._running) < self._pages.requests_at_once:
            _, _, request = heapq.heappop(self._next)
            ask = self._pages.list_deep if request.is_deep else self._pages.list_folder
            self._running[pool.submit(ask, request.place.prefix, request.token)] = request
            self.num_requests += 1

    def _take(self, request: _Request, page: Page) -> None:
        place, first = request.place, request.first
        if not request.is_deep and request.token is None and self._must_look_deep(page):
            self._ask(_Request(place, is_deep=True, first=page), place.prefix)
        elif first is not None and page.token is not None and _are_large(page.keys, place.prefix):
            self._divide(place, first, place)
        elif request.is_deep or not (page.folders or request.last):
            place.keys += page.keys
            self._num_held += len(page.keys)
            place.is_done = page.token is None
            if page.token is not None:
                where = page.keys[-1][0] if page.keys else place.prefix
                self._ask(_Request(place, page.token, request.is_deep), where)
        else:
            self._divide(place, page, request.last or place)

    def _must_look_deep(self, page: Page) -> bool:
        return self._pages.can_list_deep and (len(page.folders) > 1 or bool(page.folders and page.token))

    def _divide(self, place: _Place, page: Page, last: _Place) -> None:
        """Put the keys and folders of a page behind `last`, each folder a place of its own."""
        found = sorted([*page.keys, *((folder, None) for folder in page.folders)], key=lambda one: uri_of_path(one[0]))
        for name, about in found:
            if about is not None:
                if last is not place and last.prefix:
                    last = self._put_behind(last, "")
                last.keys.append((name, about))
                self._num_held += 1
            elif self._enters(name):
                last.is_done = last.is_done or last is place or not last.prefix
                last = self._put_behind(last, name)
                self._ask(_Request(last), name)
        if page.token is not None:
            if last is not place and last.prefix:  # all places before it may be given out by then
                last = self._put_behind(last, "")
            self._ask(_Request(place, page.token, last=last), found[-1][0] if found else place.prefix)
        elif last is place or not last.prefix:
            last.is_done = True

    def _put_behind(self, place: _Place, prefix: str) -> _Place:
        new = self._new_place(prefix)
        new.next, place.next = place.next, new
        return new

    def _given_out(self) -> Iterator[Stretch]:
        """The keys whose turn it is; all keys if too many wait."""
        while self._head is not None:
            yield from self._keys_of(self._head)
            if not self._head.is_done:
                break
            self._head = self._head.next
        if self._num_held > HELD_KEYS:
            place = self._head
            while place is not None:
                yield from self._keys_of(place)
                place = place.next

    def _keys_of(self, place: _Place) -> Iterator[Stretch]:
        if place.keys:
            keys, place.keys = place.keys, []
            self._num_held -= len(keys)
            yield Stretch(place.number, keys)


def _are_large(keys: Sequence[Key], prefix: str) -> bool:
    """Whether the folders below a prefix are large, judged by the first keys below it at any depth."""
    inside = [folder for key, _ in keys for folder, slash, _ in [key[len(prefix) :].partition("/")] if slash]
    distinct = len(set(inside))
    return distinct <= 1 or len(inside) >= LARGE_FOLDER * distinct
