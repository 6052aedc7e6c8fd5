"""Checks once whether timm's hub answers, before a file is requested from it. Weights come from it by default.

huggingface_hub tries six times for each of two files, with growing pauses, and only then uses its cache. On a machine
without a network that takes 54 s, while two requests are enough to know.
"""

import contextlib
import time
from collections.abc import Iterator

TIMEOUT_SECONDS = 4.0
TRIES = 2
PAUSE_SECONDS = 1.0


@contextlib.contextmanager
def ask_once() -> Iterator[str | None]:
    """A context in which a hub that does not answer is not asked: its cache is used. Yields the reason, or None."""
    from huggingface_hub import constants

    reason = None if constants.HF_HUB_OFFLINE else why_silent()
    before = constants.HF_HUB_OFFLINE
    if reason is not None:
        constants.HF_HUB_OFFLINE = True
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


def why_silent() -> str | None:
    """Why the hub does not answer, with its address; None if it answers with any status below 500."""
    from huggingface_hub import constants, get_session

    said = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE_SECONDS * bool(attempt))
        try:
            answer = get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
        except Exception as error:  # the HTTP client, and so the error type, differs between the hub's releases
            said = f"does not answer: {(str(error) or type(error).__name__).splitlines()[0]}"
            continue
        if answer.status_code < 500:
            return None
        said = f"is down: it answers {answer.status_code}"
    return f"{constants.ENDPOINT} {said}"
