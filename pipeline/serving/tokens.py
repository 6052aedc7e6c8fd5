"""The token by which a memory may be changed: what can be one, and whether a request carries it."""

import contextlib
import hmac

from starlette.types import Scope

from pipeline.errors import UsageError


def checked_token(text: str, place: str) -> str:
    """A token without the white space around it. Raises UsageError, which names `place`, for what can never match."""
    token = text.strip()
    if not token:
        raise UsageError(f"{place} holds no token, only white space: write the token into it")
    if not token.isprintable():
        raise UsageError(
            f"{place} holds several lines, or characters that no header can carry: write one token, on one line"
        )
    return token


def carries(scope: Scope, token: str | None) -> bool:
    """Whether a request carries the token, as `Authorization: Bearer TOKEN`. It is compared in constant time.

    A token beyond ASCII may come in UTF-8 or in Latin-1: programs differ in how they send it.
    """
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if token is None or len(given) != 1:
        return False
    scheme, _, sent = given[0].strip().partition(b" ")
    sent = sent.strip(b" \t")
    forms = [token.encode(errors="surrogateescape")]
    with contextlib.suppress(UnicodeEncodeError):
        forms.append(token.encode("latin-1"))
    same = [hmac.compare_digest(sent, form) for form in forms]
    return scheme.lower() == b"bearer" and any(same)
