"""What each answer of an S3 server means."""

from __future__ import annotations

import pytest

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
)
from ckptd.store.codes import Answer, answer_of, translate

KEY = "ranks/000000001000-0007/00003"

TABLE = [
    # status, code, what it means
    (404, "NoSuchKey", ObjectNotFoundError),
    (404, "", StoreUnavailableError),
    (404, "404", StoreUnavailableError),  # botocore, of a HEAD
    (412, "PreconditionFailed", ObjectExistsError),
    (412, "", ObjectExistsError),
    (404, "NoSuchBucket", BucketNotFoundError),
    (301, "PermanentRedirect", BucketNotFoundError),
    (301, "", BucketNotFoundError),
    (400, "AuthorizationHeaderMalformed", BucketNotFoundError),
    (400, "IllegalLocationConstraintException", BucketNotFoundError),
    (403, "AccessDenied", StoreAccessDeniedError),
    (403, "AllAccessDisabled", StoreAccessDeniedError),
    (403, "AccountProblem", StoreAccessDeniedError),
    (403, "", StoreAccessDeniedError),
    (403, "Forbidden", StoreAccessDeniedError),
    (400, "ExpiredToken", CredentialsError),
    (400, "ExpiredTokenException", CredentialsError),
    (400, "InvalidToken", CredentialsError),
    (400, "TokenRefreshRequired", CredentialsError),
    (403, "InvalidAccessKeyId", CredentialsError),
    (403, "SignatureDoesNotMatch", CredentialsError),
    (403, "RequestTimeTooSkewed", CredentialsError),
    (401, "", CredentialsError),
    (500, "InternalError", StoreUnavailableError),
    (503, "SlowDown", StoreUnavailableError),
    (503, "ServiceUnavailable", StoreUnavailableError),
    (400, "RequestTimeout", StoreUnavailableError),
    (408, "", StoreUnavailableError),
    (409, "ConditionalRequestConflict", StoreUnavailableError),
    (409, "OperationAborted", StoreUnavailableError),
    (409, "", StoreUnavailableError),
    (425, "", StoreUnavailableError),
    (429, "", StoreUnavailableError),
    (429, "TooManyRequests", StoreUnavailableError),
    (307, "TemporaryRedirect", StoreUnavailableError),
    (400, "BadDigest", StoreUnavailableError),
    (400, "XAmzContentSHA256Mismatch", StoreUnavailableError),
    (400, "XAmzContentChecksumMismatch", StoreUnavailableError),
    (400, "IncompleteBody", StoreUnavailableError),
    (507, "", StoreFullError),
    (507, "XMinioStorageFull", StoreFullError),
    (403, "QuotaExceeded", StoreFullError),
    (400, "EntityTooLarge", StoreRefusedError),
    (416, "InvalidRange", StoreError),
    (416, "", StoreError),
]


@pytest.mark.parametrize(("status", "code", "kind"), TABLE)
def test_an_answer_means_one_thing(status: int, code: str, kind: type[StoreError]) -> None:
    error = translate(Answer(status, code, "said the server"), KEY)
    assert type(error) is kind
    assert error.key == KEY
    assert str(error).endswith(f": {KEY}")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (200, "SlowDown", StoreUnavailableError),
        (200, "AccessDenied", StoreAccessDeniedError),
        (500, "NoSuchBucket", BucketNotFoundError),  # what botocore makes of an error with 200
        (403, "SlowDown", StoreUnavailableError),
        (404, "InternalError", StoreUnavailableError),
        (403, "NoSuchBucket", BucketNotFoundError),
        (503, "ExpiredToken", CredentialsError),
        (412, "ConditionalRequestConflict", StoreUnavailableError),
    ],
)
def test_the_code_decides_before_the_status(status: int, code: str, kind: type[StoreError]) -> None:
    assert type(translate(Answer(status, code), KEY)) is kind


@pytest.mark.parametrize("status", [400, 402, 405, 406, 410, 411, 418, 422, 451, 499])
@pytest.mark.parametrize("code", ["", "Newfangled"])
def test_unknown_refusals_are_not_tried_again(status: int, code: str) -> None:
    error = translate(Answer(status, code), KEY)
    assert type(error) is StoreRefusedError
    assert not error.retryable


@pytest.mark.parametrize("status", [0, 100, 200, 204, 302, 500, 502, 503, 504, 520, 599])
@pytest.mark.parametrize("code", ["", "Newfangled"])
def test_whatever_else_is_unknown_may_pass(status: int, code: str) -> None:
    error = translate(Answer(status, code), KEY)
    assert type(error) is StoreUnavailableError
    assert error.retryable


def test_r1_only_three_answers_speak_of_the_object_itself() -> None:
    """A plain `StoreError`, "not found" and "exists" are facts about it; nothing else may be."""
    codes = {code for _, code, _ in TABLE} | {"", "Newfangled"}
    found: dict[type[StoreError], set[str]] = {}
    for code in codes:
        for status in (*range(100, 404), *range(405, 412), *range(413, 416), *range(417, 600)):
            found.setdefault(type(translate(Answer(status, code), KEY)), set()).add(code)
    assert found[StoreError] == {"InvalidRange"}
    assert found[ObjectNotFoundError] == {"NoSuchKey"}
    assert found[ObjectExistsError] == {"PreconditionFailed"}


@pytest.mark.parametrize(("status", "code", "kind"), TABLE)
def test_a_message_says_what_to_do_and_what_was_said(
    status: int, code: str, kind: type[StoreError]
) -> None:
    text = str(translate(Answer(status, code, "x" * 500), KEY))
    assert len(text) < 500
    if kind not in (ObjectNotFoundError, ObjectExistsError):
        assert f"({status} " in text
        assert code in text


def test_the_error_is_read_out_of_what_botocore_parsed() -> None:
    response = {
        "Error": {"Code": "SlowDown", "Message": "Reduce your rate", "Extra": 1},
        "ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {}},
    }
    assert answer_of(response) == Answer(503, "SlowDown", "Reduce your rate")


@pytest.mark.parametrize(
    "response",
    [{}, {"Error": None}, {"Error": "odd", "ResponseMetadata": ["odd"]},
     {"Error": {}, "ResponseMetadata": {"HTTPStatusCode": "503"}}],
)  # fmt: skip
def test_an_answer_that_is_no_error_document_may_pass(response: dict) -> None:
    assert answer_of(response) == Answer(0, "", "")
    assert type(translate(answer_of(response), KEY)) is StoreUnavailableError
