"""What an S3 server or the network answered, as the fault it stands for."""

import re
from typing import Any, NamedTuple

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoAuthTokenError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
from botocore.parsers import ResponseParserError

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.store import transport
from finetune_trainer.store.transport import AnswerTooLargeError, CallTimeoutError, ForbiddenAnswerError

EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
# The credentials themselves are refused: newer ones may be in the Secret by now.
REFUSED_CREDENTIALS = EXPIRED | {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "XAdminUserNotFound",  # versitygw's word for InvalidAccessKeyId, with HTTP 404
}
_NO_SUCH_KEY = frozenset({"NoSuchKey", "404"})  # 404: an answer without a body
_DENIED = frozenset(
    {
        "AccessDenied",
        "AuthorizationHeaderMalformed",
        "Forbidden",
        "AllAccessDisabled",
        "UnauthorizedAccess",
        "AccountProblem",
    }
)
_ELSEWHERE = frozenset({"PermanentRedirect", "IllegalLocationConstraintException", "IncorrectEndpoint", "301"})
MAX_OBJECT_BYTES = 1 << 50  # twenty times the largest object of S3
MAX_ETAG_CHARS = 1024  # those of S3 have at most 38
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_FIELD = "its URI in the job"  # for callers that do not name the field with `spec_field`


class Attempted(NamedTuple):
    """What was tried, for the words of an error."""

    action: str
    uri: str
    bucket: str
    endpoint: str
    region: str
    seconds: float


def error_code(error: ClientError) -> str:
    """The server's error code; for answers without a body the HTTP status as text."""
    return _part(error, "Code") or str(http_status(error))


def _part(error: ClientError, name: str) -> str:
    """A part of the server's error; "" where it is no text, as an element may hold others."""
    found: object = error.response.get("Error", {}).get(name)
    return found if isinstance(found, str) else ""


def http_status(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def tries(error: ClientError) -> int:
    """How often the request was sent; above 1 an earlier answer may have been lost."""
    return error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) + 1


def answered(error: ClientError, tried: Attempted) -> StageError:
    """The fault of an error that the server answered."""
    code = error_code(error)
    if code == "RequestTimeTooSkewed":
        return unavailable(tried, tries(error), "the clocks of this node and of the store differ too much")
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return StageError(Fault.BUCKET_NOT_FOUND, bucket=tried.bucket, endpoint=tried.endpoint, field=_FIELD)
    if _is_elsewhere(error):
        return StageError(Fault.WRONG_REGION, bucket=tried.bucket, region=tried.region, endpoint=tried.endpoint)
    if code in EXPIRED:
        return StageError(Fault.TOKEN_EXPIRED, action=tried.action, uri=tried.uri)
    if code in _DENIED or code in REFUSED_CREDENTIALS or http_status(error) in (401, 403):
        return StageError(Fault.ACCESS_DENIED, action=tried.action, uri=tried.uri)
    if code in _NO_SUCH_KEY:
        return not_found(tried.uri)
    known = re.sub(r"[^A-Za-z0-9.]", "", code)[:64]  # from the network: may be anything
    return unavailable(tried, tries(error), f"the store answered {known} (HTTP {http_status(error)})")


def _is_elsewhere(error: ClientError) -> bool:
    """Whether the bucket is in another region, and the server did not say where, or boto3 would have asked there."""
    if error_code(error) == "AuthorizationHeaderMalformed":  # also for an access key that is no access key
        return "region" in _part(error, "Message").lower()
    return error_code(error) in _ELSEWHERE


def untrusted(error: BaseException | None) -> str | None:
    """Why the server's certificate was refused; None where something else was wrong, such as a cut connection."""
    if not isinstance(error, SSLError):
        return None
    found = re.search(r"certificate verify failed: ([A-Za-z -]{1,100})", str(error))
    return found[1].strip() if found else None


def unanswered(error: BotoCoreError, tried: Attempted, max_tries: int) -> StageError:
    """The fault of a request that got no answer, or that could not be made."""
    times = max_tries
    match error:
        case CallTimeoutError():
            times = error.tries
            problem = f"{tried.endpoint} does not answer to the end within {transport.CALL_TIMEOUT_S} s"
        case AnswerTooLargeError():
            times = 1
            problem = (
                f"{tried.endpoint} answers with more than {transport.MAX_ANSWER_BYTES >> 20} MiB where S3 says less"
            )
        case ForbiddenAnswerError():
            times = 1
            problem = f"{tried.endpoint} does not answer as S3 does: XML with declarations, or no text"
        case ParamValidationError():  # such a name cannot even be asked for
            return StageError(Fault.CONFIG_UNREADABLE, field=tried.uri, problem="not a valid bucket and key")
        case NoCredentialsError() | PartialCredentialsError() | NoAuthTokenError():
            return StageError(Fault.NO_CREDENTIALS)
        case CredentialRetrievalError() | TokenRetrievalError() | UnauthorizedSSOTokenError():
            return StageError(Fault.NO_CREDENTIALS)
        case SSLError() if problem := untrusted(error):
            return StageError(Fault.CERTIFICATE_UNTRUSTED, endpoint=tried.endpoint, problem=problem)
        case ProxyConnectionError():
            problem = "the HTTP proxy does not answer"
        case EndpointConnectionError() | ConnectTimeoutError():
            problem = f"no connection to {tried.endpoint}"
        case ReadTimeoutError():
            problem = f"{tried.endpoint} stopped answering"
        case _:
            problem = f"the connection to {tried.endpoint} broke ({type(error).__name__})"
    return unavailable(tried, times, problem)


class OddAnswerError(Exception):
    """An answer lacks or garbles what every S3 says; the text names what, and quotes nothing of it."""


# What botocore raises when it takes values from an answer that was made to be no answer of S3.
ODD = (OddAnswerError, ResponseParserError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def odd(error: Exception, tried: Attempted) -> StageError:
    """The fault of an answer that could be read, but not understood."""
    what = str(error) if isinstance(error, OddAnswerError) else type(error).__name__
    return unavailable(tried, 1, f"{tried.endpoint} does not answer as S3 does: {what}")


def size_of(answer: dict[str, Any], name: str) -> int:
    """The size in bytes that an answer names. Raises OddAnswerError."""
    size_bytes = answer.get(name)
    if not isinstance(size_bytes, int) or not 0 <= size_bytes <= MAX_OBJECT_BYTES:
        raise OddAnswerError("it names no size, or one that no object has")
    return size_bytes


def etag_of(answer: dict[str, Any]) -> str:
    """The ETag that an answer names. Raises OddAnswerError."""
    etag = answer.get("ETag")
    if not isinstance(etag, str) or not 0 < len(etag) <= MAX_ETAG_CHARS:
        raise OddAnswerError("it names no ETag, or one of thousands of characters")
    return etag


def range_of(text: str) -> tuple[int, int]:
    """(first byte, size of the whole object) of a Content-Range as "bytes 5-9/10". Raises OddAnswerError."""
    found = _CONTENT_RANGE.fullmatch(text)
    if found is None:
        raise OddAnswerError("its Content-Range says no place")
    first, last, total = (int(number) for number in found.groups())
    if not first <= last < total or total > MAX_OBJECT_BYTES:
        raise OddAnswerError("its Content-Range contradicts itself")
    return first, total


def unavailable(tried: Attempted, times: int, problem: str) -> StageError:
    return StageError(
        Fault.STORAGE_UNAVAILABLE,
        action=tried.action,
        uri=tried.uri,
        tries=times,
        seconds=round(tried.seconds),
        problem=problem,
    )


def not_found(uri: str) -> StageError:
    return StageError(Fault.OBJECT_NOT_FOUND, uri=uri, field=_FIELD)
