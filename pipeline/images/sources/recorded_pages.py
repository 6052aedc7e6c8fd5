"""The pages of a store with a record before them: what is recorded is not asked for again."""

from typing import Protocol

from pipeline.images.sources.keys import Page, Pages
from pipeline.images.sources.listing_record import ListingRecord, PageRequest


class ResumablePages(Pages, Protocol):
    """The requests to a store that can also begin behind a key."""

    def list_after(self, prefix: str, key: str, *, is_deep: bool) -> Page:
        """The keys below a prefix behind a key; with `is_deep` at any depth, else with the folders directly below."""


class RecordedPages:
    """The pages of a store, each from the record or else asked for and recorded.

    Where the record ends, a prefix goes on behind its last key rather than by the token of an answer that may be a day
    old: S3 says nothing of how long a token holds. Behind a page with folders, or with keys in no order, only the
    token says where to go on.
    """

    def __init__(self, pages: ResumablePages, record: ListingRecord) -> None:
        self.can_list_deep = pages.can_list_deep
        self.requests_at_once = pages.requests_at_once
        self._pages = pages
        self._record = record
        self._last_keys: dict[PageRequest, str] = {}  # before a page that was not asked for yet

    def list_folder(self, prefix: str, token: str | None) -> Page:
        return self._page(PageRequest(False, prefix, token))

    def list_deep(self, prefix: str, token: str | None) -> Page:
        return self._page(PageRequest(True, prefix, token))

    def _page(self, request: PageRequest) -> Page:
        page = self._record.page(request)
        after = self._last_keys.pop(request, None)
        if page is not None:
            last = _last_key(page)
            if page.token is not None and last is not None:
                self._last_keys[request._replace(token=page.token)] = last
            return page
        if after is not None:
            page = self._pages.list_after(request.prefix, after, is_deep=request.is_deep)
        else:
            ask = self._pages.list_deep if request.is_deep else self._pages.list_folder
            page = ask(request.prefix, request.token)
        self._record.note(request, page)
        return page


def _last_key(page: Page) -> str | None:
    """The key behind which a listing goes on; None if only the token of the page says where."""
    names = [key for key, _ in page.keys]
    return names[-1] if names and not page.folders and names == sorted(names) else None
