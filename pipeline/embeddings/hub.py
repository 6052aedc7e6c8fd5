"""timm's hub, where weights come from that nobody gave: asked once whether it answers, before it is asked for a file.

huggingface_hub asks six times for each of two files, with growing pauses, and falls back to its cache only then: 54 s
on a machine without a network, where two questions tell the same.
"""

import contextlib
import time
from collections.abc import Iterator

TIMEOUT_SECONDS = 4.0
TRIES = 2
PAUSE_SECONDS = 1.0


@contextlib.contextmanager
def ask_once() -> Iterator[str | None]:
    """Within it the hub is not asked where it does not answer, and its cache has to do; yields why, None if it does."""
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
    """Why the hub does not answer, with its address; None where it does, whatever it says."""
    from huggingface_hub import constants, get_session

    said = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE_SECONDS * bool(attempt))
        try:
            answer = get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
        except Exception as error:  # of its HTTP client, which is another in each of its releases
            said = f"does not answer: {(str(error) or type(error).__name__).splitlines()[0]}"
            continue
        if answer.status_code < 500:
            return None
        said = f"is down: it answers {answer.status_code}"
    return f"{constants.ENDPOINT} {said}"
