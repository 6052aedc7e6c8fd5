"""Error messages for failed requests to an object store: one sentence each, with advice."""

import errno
import sys
import tempfile
from collections.abc import Sequence

from pipeline.errors import NotPermitted, StorageError

REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "RequestTimeTooSkewed"}
DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403"}
ELSEWHERE = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
NO_ROOM = {"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "500", "InternalError"}
THROTTLED = {"SlowDown", "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequests", "429"}
BUSY = THROTTLED | {"ServiceUnavailable", "InternalError", "RequestTimeout", "BandwidthLimitExceeded"}
BUSY |= {"500", "502", "503", "504"}
UNSUPPORTED = {"NotImplemented", "501", "MethodNotAllowed", "405"}

_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "NoAuthTokenError",
    "ProfileNotFound",
)
_UNREACHABLE = ("ConnectionError", "HTTPClientError")


def code_of(error: BaseException) -> str:
    """S3's code for an error, also if s3fs has it as the cause of its own error; empty if it did not come from S3."""
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def is_transient(error: BaseException) -> bool:
    """Whether the store answered that it cannot serve the request now, so that a retry may succeed."""
    return code_of(error) in BUSY


def lacks_credentials(error: BaseException) -> bool:
    """Whether credentials are missing, or the store refuses them for every request."""
    return _is_botocores(error, _NO_CREDENTIALS) or code_of(error) in REFUSED


def is_denied(error: BaseException) -> bool:
    """Whether the store accepts the credentials, but they lack the permission for this request."""
    code = code_of(error)
    return code in DENIED or (not code and isinstance(error, PermissionError))


def refusal(error: Exception, uri: str, doing: str, path: str) -> StorageError:
    """The library's error for one raised while `doing` ("read", "write to") `path` in the memory at `uri`."""
    said = explanation(error, uri, doing, f"{uri}/{path}".rstrip("/"))
    if not is_denied(error):
        return StorageError(said)
    denied = NotPermitted(said)
    denied.path = path
    return denied


def explanation(error: Exception, uri: str, doing: str, where: str) -> str:
    """The message for an error raised while `doing` ("read", "write to") `where` in the memory at `uri`."""
    code, said = code_of(error), " ".join(str(error).split())
    if code:
        return _answer(code, said, uri, doing, where)
    if _is_botocores(error, _NO_CREDENTIALS):
        return f"there are no credentials for {uri} ({said}): set AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret"
    if isinstance(error, PermissionError):
        return _may_not(doing, where)
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"there is no room for a copy of {where} in {tempfile.gettempdir()}: make room there, or set TMPDIR"
    if isinstance(error, OSError) or _is_botocores(error, _UNREACHABLE):
        look = "the network and at AWS_ENDPOINT_URL" if uri.startswith("s3") else "the network"
        return f"the store of {uri} cannot be reached ({said}): look at {look}"
    return f"the store could not {doing} {where} ({type(error).__name__}: {said}): correct the URI, or the settings"


def _answer(code: str, said: str, uri: str, doing: str, where: str) -> str:
    """The message for an error code of S3."""
    if code in REFUSED:
        return f"the store of {uri} refuses these credentials ({code}): correct or renew them"
    if code in DENIED:
        return _may_not(doing, where)
    if code == "NoSuchBucket":
        return f"there is no bucket for {uri}: create it, or correct the URI"
    if code in ELSEWHERE:
        return f"the bucket of {uri} is in another region ({said}): set AWS_DEFAULT_REGION to its own"
    if code in NO_ROOM:
        return f"the store could not {doing} {where} ({code}): look whether it has room left, then try again"
    return f"the store could not {doing} {where} ({code}: {said}): try again, and look at the store if it stays so"


def _may_not(doing: str, where: str) -> str:
    return f"permission denied: these credentials may not {doing} {where}: have them allowed to, or use others"


def _is_botocores(error: BaseException, names: Sequence[str]) -> bool:
    """Whether an error is one of botocore's errors; False if botocore was never imported."""
    botocore = sys.modules.get("botocore.exceptions")
    return botocore is not None and isinstance(error, tuple(getattr(botocore, name) for name in names))
