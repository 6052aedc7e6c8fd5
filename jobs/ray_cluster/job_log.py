"""Passes on the log of a job as it arrives, and separates the JSON document in it from the rest.

Ray writes the stdout and stderr of a job into one file, which does not mark their origin. The form of a document
identifies it: `print_json` opens and closes it in the first column, and indents all lines between.
"""

import json
from collections.abc import Callable

_CLOSING = {"{": "}", "[": "]"}


class JobLog:
    """Passes a log on in whole lines; with `json` everything but the last document goes to `tell_rest`.

    `text` may be cut anywhere. If the log is read again from its beginning, after a lost connection, the part that was
    passed on is skipped.
    """

    def __init__(self, tell: Callable[[str], object], tell_rest: Callable[[str], object], *, json: bool) -> None:
        self._tell = tell
        self._tell_rest = tell_rest
        self._json = json
        self._seen = 0  # characters passed on or held back
        self._at = 0  # characters read since the log was last opened
        self._line = ""
        self._held: list[str] = []
        self._document = ""

    @property
    def length(self) -> int:
        """The number of characters received so far."""
        return self._seen

    def reopen(self) -> None:
        """Note that the log starts again from its beginning."""
        self._at = 0

    def write(self, text: str) -> None:
        """Take the next piece of the log."""
        new = text[max(self._seen - self._at, 0) :]
        self._at += len(text)
        self._seen = max(self._seen, self._at)
        *lines, self._line = (self._line + new).split("\n")
        for line in lines:
            self._take(f"{line}\n")

    def end(self) -> None:
        """The log is complete: pass on what was held back."""
        if self._line:
            self._take(self._line)
            self._line = ""
        self._let_go()
        if self._document:
            self._tell(self._document)

    def _take(self, line: str) -> None:
        if not self._json:
            self._tell(line)
            return
        first = self._held[0][0] if self._held else line[:1]
        if first not in _CLOSING:
            self._tell_rest(line)
            return
        if self._held and line[:1] in _CLOSING:  # the held lines were no document; this line may begin one
            self._let_go()
            first = line[0]
        self._held.append(line)
        if line.rstrip().endswith(_CLOSING[first]) and (len(self._held) == 1 or line.startswith(_CLOSING[first])):
            self._finish_document()

    def _finish_document(self) -> None:
        text = "".join(self._held)
        try:
            json.loads(text)
        except ValueError:
            self._let_go()
            return
        if self._document:
            self._tell_rest(self._document)
        self._document, self._held = text, []

    def _let_go(self) -> None:
        for line in self._held:
            self._tell_rest(line)
        self._held = []
