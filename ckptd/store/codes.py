"""What the answers of an S3 server mean for a store: the one place that translates them.

The code in the answer decides, then the status: s3fs maps both to a few `OSError`s in which an
expired token looks like a missing permission (s3fs 2026.9.0, ``s3fs.errors``). Codes:
https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ckptd.errors import (
    BucketNotFoundError,
    CredentialsError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreUnavailableError,
    StoreUnsupportedError,
)


class Answer(NamedTuple):
    """What a server said: the status of HTTP, and the code and text of its error document."""

    status: int
    code: str
    text: str = ""


class _Meaning(NamedTuple):
    kind: type[StoreError]
    advice: str


_CREDENTIALS = _Meaning(
    CredentialsError, "the store does not take these credentials; renew them or name others"
)
_UNAVAILABLE = _Meaning(StoreUnavailableError, "the store cannot now; it may later")
_DENIED = _Meaning(
    StoreAccessDeniedError,
    "not allowed; docs/operations.md has the policies that a writer and a reader need",
)
_BUCKET = _Meaning(
    BucketNotFoundError, "there is no such bucket at this endpoint; check its name, or create it"
)
_REGION = _Meaning(
    BucketNotFoundError,
    "the bucket is in another region, or at another endpoint; set region_name or endpoint_url",
)
_FULL = _Meaning(StoreFullError, "the store has no room left; prune, or raise its quota")
_UNSUPPORTED = _Meaning(StoreUnsupportedError, "the service does not know this request")
_REFUSED = _Meaning(StoreRefusedError, "the store does not take this request")

_CODES: dict[str, _Meaning] = {
    "NoSuchKey": _Meaning(ObjectNotFoundError, "not found"),
    "NoSuchBucket": _BUCKET,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PreconditionFailed": _Meaning(ObjectExistsError, "exists already"),
    "InvalidRange": _Meaning(StoreError, "that range leaves the object"),
    "NotImplemented": _UNSUPPORTED,
    "EntityTooLarge": _Meaning(StoreRefusedError, "larger than the store takes in one request"),
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired",
         "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestExpired", "MissingSecurityHeader"),
        _CREDENTIALS,
    ),
    "RequestTimeTooSkewed": _Meaning(
        CredentialsError, "the clock of this machine is wrong, says the store; set it"
    ),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "AccountProblem"), _DENIED),
    **dict.fromkeys(
        ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling",
         "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded",
         # Somebody else writes that key at this moment: ask again.
         "ConditionalRequestConflict", "OperationAborted",
         # The bytes changed on their way.
         "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"),
        _UNAVAILABLE,
    ),
    **dict.fromkeys(
        ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded",
         "InsufficientStorage"),
        _FULL,
    ),
}  # fmt: skip

_STATUS: dict[int, _Meaning] = {
    301: _REGION,
    307: _UNAVAILABLE,
    401: _CREDENTIALS,
    403: _DENIED,
    404: _UNAVAILABLE,  # without S3's own code: somebody in between, and never absence
    408: _UNAVAILABLE,
    409: _UNAVAILABLE,
    412: _CODES["PreconditionFailed"],
    416: _CODES["InvalidRange"],
    425: _UNAVAILABLE,
    429: _UNAVAILABLE,
    501: _UNSUPPORTED,
    507: _FULL,
}


def translate(answer: Answer, key: str) -> StoreError:
    """Return what an error answer means for the object `key`.

    What is not known counts by its status: of 500 and above it may pass, of 400 it will not.
    """
    meaning = _CODES.get(answer.code) or _STATUS.get(answer.status)
    if meaning is None:
        meaning = _REFUSED if 400 <= answer.status < 500 else _UNAVAILABLE
    said = " ".join(part for part in (answer.code, answer.text[:200]) if part)
    if meaning.kind in (ObjectNotFoundError, ObjectExistsError):
        return meaning.kind(key, meaning.advice)
    return meaning.kind(key, f"{meaning.advice} ({answer.status} {said})")


def answer_of(response: Mapping[str, object]) -> Answer:
    """Read the error out of what botocore parsed (``ClientError.response``)."""
    error = response.get("Error")
    metadata = response.get("ResponseMetadata")
    error = error if isinstance(error, Mapping) else {}
    metadata = metadata if isinstance(metadata, Mapping) else {}
    status = metadata.get("HTTPStatusCode")
    return Answer(
        status if isinstance(status, int) else 0,
        str(error.get("Code", "")),
        str(error.get("Message", "")),
    )
