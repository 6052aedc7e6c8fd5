"""The token that allows changes to a memory: which texts are valid, and whether a request carries it."""

import contextlib
import hmac

from starlette.types import Scope

from pipeline.errors import UsageError


def check_token(text: str, place: str) -> str:
    """The token without surrounding white space. Raises UsageError, naming `place`, if it can never match."""
    token = text.strip()
    if not token:
        raise UsageError(f"{place} holds no token, only white space: write the token into it")
    if not token.isprintable():
        raise UsageError(
            f"{place} holds several lines, or characters that no header can carry: write one token, on one line"
        )
    return token


def carries(scope: Scope, token: str | None) -> bool:
    """Whether a request carries the token as `Authorization: Bearer TOKEN`. The comparison takes constant time.

    A token with characters beyond ASCII may arrive in UTF-8 or in Latin-1: programs differ in how they send it.
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
