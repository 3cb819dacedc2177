"""What an S3 server or the network answered, as the fault it stands for."""

import re
from typing import NamedTuple

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

from finetune_api.errors import StageError
from finetune_api.reasons import Fault

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
    return error.response.get("Error", {}).get("Code", "") or str(http_status(error))


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
        return "region" in error.response.get("Error", {}).get("Message", "").lower()
    return error_code(error) in _ELSEWHERE


def untrusted(error: BaseException | None) -> str | None:
    """Why the server's certificate was refused; None where something else was wrong, such as a cut connection."""
    if not isinstance(error, SSLError):
        return None
    found = re.search(r"certificate verify failed: ([A-Za-z -]{1,100})", str(error))
    return found[1].strip() if found else None


def unanswered(error: BotoCoreError, tried: Attempted, max_tries: int) -> StageError:
    """The fault of a request that got no answer, or that could not be made."""
    match error:
        case ParamValidationError():  # such a name cannot even be asked for
            return StageError(Fault.CONFIG_UNREADABLE, field=tried.uri[:200], problem="not a valid bucket and key")
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
    return unavailable(tried, max_tries, problem)


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
