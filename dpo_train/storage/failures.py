"""What an error means: refused for good, or worth another attempt; and how long to wait before that. All pure.

Errors are told apart by the code that the server sends, else by the names of the error's classes, so that nothing heavy
needs importing.
"""

from __future__ import annotations

import re

from dpo_train.errors import StoreError

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
_MESSAGE_CHARS = 300

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with temporary ones AWS_SESSION_TOKEN too) or AWS_PROFILE, "
    "or give the machine a role; for a public bucket set storage.anonymous: true"
)
_REGION = "set storage.region or AWS_REGION to the bucket's region"
_PERMISSION = "ask for {needed} on it, or use other credentials"

# Code of the server, or class of the error -> what it means, what to do.
_REFUSALS = {
    "NoCredentialsError": ("There are no credentials", _CREDENTIALS),
    "PartialCredentialsError": ("The credentials are incomplete", _CREDENTIALS),
    "ProfileNotFound": ("The credentials' profile does not exist", "set AWS_PROFILE to one that `aws configure` knows"),
    "TokenRetrievalError": ("The single sign-on session is not valid", "run `aws sso login`"),
    "SSOTokenLoadError": ("The single sign-on session is not valid", "run `aws sso login`"),
    "UnauthorizedSSOTokenError": ("The single sign-on session has ended", "run `aws sso login`"),
    "InvalidAccessKeyId": ("The server does not know this access key", "check AWS_ACCESS_KEY_ID and storage.endpoint"),
    "InvalidClientTokenId": ("The server does not know this access key", "check AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": ("The secret key does not belong to the access key", "check AWS_SECRET_ACCESS_KEY"),
    "InvalidToken": ("The session token is not valid", "renew AWS_SESSION_TOKEN together with the keys"),
    "ExpiredToken": ("The credentials have expired", "renew them and run the same command again"),
    "ExpiredTokenException": ("The credentials have expired", "renew them and run the same command again"),
    "TokenRefreshRequired": ("The credentials have expired", "renew them and run the same command again"),
    "RequestTimeTooSkewed": ("This machine's clock differs from the server's", "set the clock"),
    "AuthorizationHeaderMalformed": ("The server refused the signature", _REGION),
    "PermanentRedirect": ("The bucket lies in another region", _REGION),
    "IllegalLocationConstraintException": ("The bucket lies in another region", _REGION),
    "AccessDenied": ("Access is denied", _PERMISSION),
    "AllAccessDisabled": ("Access is denied", _PERMISSION),
    "AccountProblem": ("The account is not in order", "ask who administers it"),
    "NotSignedUp": ("The account is not in order", "ask who administers it"),
    "NoSuchBucket": ("The bucket does not exist", "check its name and storage.endpoint, or create it"),
    "InvalidBucketName": ("The bucket's name is not valid", "check its name"),
    "ParamValidationError": ("The bucket's name or the key is not valid", "check the address"),
    "NoSuchKey": ("The object does not exist", "check the address"),
    "InvalidObjectState": ("The object is archived", "restore it first"),
    "PreconditionFailed": ("The object was replaced while it was being read", "run again when its writer is done"),
    "InvalidEndpoint": ("The server's address is not valid", "check storage.endpoint and AWS_ENDPOINT_URL"),
    "SSLCertVerificationError": (
        "The server's certificate is not trusted",
        "set AWS_CA_BUNDLE, or mend storage.endpoint",
    ),
}

# Status 4xx, and yet worth another attempt: throttling, a body damaged or cut on its way.
_PASSING_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "RequestTimeout",
    "RequestTimeoutException", "BadDigest", "IncompleteBody", "OperationAborted", "ConditionalRequestConflict",
    "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}  # fmt: skip
_PASSING_STATUS = {408, 429}

# Classes of botocore and aiohttp whose errors are the network's; OSError holds Python's own (resets, time-outs).
_PASSING_KINDS = {
    "HTTPClientError", "ConnectionError", "EndpointConnectionError", "ResponseStreamingError", "IncompleteReadError",
    "ReadTimeoutError", "ResponseParserError", "ChecksumError", "FlexibleChecksumError", "CredentialRetrievalError",
    "MetadataRetrievalError", "ClientPayloadError", "ClientConnectionError", "HttpProcessingError", "OSError",
}  # fmt: skip

# Errors whose class does not tell.
_SIGNS = {"CERTIFICATE_VERIFY_FAILED": "SSLCertVerificationError", "Invalid endpoint:": "InvalidEndpoint"}

# HEAD has no body and so no code.
_BY_STATUS = {"301": "PermanentRedirect", "403": "AccessDenied", "404": "NoSuchKey", "412": "PreconditionFailed"}


def pause_s(failures: int, luck: float) -> float:
    """Seconds to wait after so many failures (from 1): doubling, at most ``LONGEST_PAUSE_S``, times 0.5 to 1 by luck.

    ``luck`` is in [0, 1); it keeps many workers from coming back all at once.
    """
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1))) * (0.5 + 0.5 * luck)


def code_of(error: BaseException) -> str:
    """The server's code, such as "NoSuchKey"; of other errors the name of their class."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        return _BY_STATUS.get(code, code)
    for sign, code in _SIGNS.items():
        if sign in str(error):
            return code
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name in _REFUSALS), names[0])


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    code = code_of(error)
    if code in _REFUSALS:
        return False
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
        return code in _PASSING_CODES or status in _PASSING_STATUS or (status >= 500 and status != 501)
    return any(kind.__name__ in _PASSING_KINDS for kind in type(error).__mro__)


def is_foreign(error: BaseException) -> bool:
    """Whether the error is the server's or the network's at all, and not a mistake of this program."""
    known = getattr(error, "response", None) is not None or code_of(error) in _REFUSALS or may_pass(error)
    return known or any(kind.__name__ == "BotoCoreError" for kind in type(error).__mro__)


def refusal(error: BaseException, action: str, path: str, *, anonymous: bool) -> StoreError:
    """The one line about an error that would only repeat itself. ``action`` is a verb: "read", "write", "list"."""
    code = code_of(error)
    what, fix = _REFUSALS.get(code, ("The request was refused", "check the address and the storage settings"))
    if code in {"AccessDenied", "AllAccessDisabled"}:
        needed = {"write": "s3:PutObject", "list": "s3:ListBucket", "delete": "s3:DeleteObject"}.get(
            action, "s3:GetObject (and s3:ListBucket, without which a missing object looks the same)"
        )
        fix = "set storage.anonymous: false and give credentials" if anonymous else fix.format(needed=needed)
    got = None if code in {"NoSuchKey", "NoSuchBucket", "NoCredentialsError"} else described(error)
    return StoreError(f"Cannot {action} {path}: {what[0].lower()}{what[1:]}", got=got, fix=fix)


def described(error: BaseException) -> str:
    """An error in one line for a message."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        told = response.get("Error", {})
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        text = f"{told.get('Code')} ({status}): {told.get('Message') or 'no message'}"
    else:
        text = f"{type(error).__name__}: {error}"
    return redacted(" ".join(text.split()))[:_MESSAGE_CHARS].rstrip(".")


def redacted(text: str) -> str:
    """A text without the access keys of Amazon's shape and the passwords in addresses that it may hold."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", re.sub(r"\b(AKIA|ASIA)[A-Z0-9]{12,}\b", r"\1***", text))
