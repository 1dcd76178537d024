"""Secrets out of what is printed, written down or sent: lines, configurations, command lines, names of sources."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"

_SECRET_ANYWHERE = frozenset(
    {"secret", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey"}
)
_SECRET_LAST = frozenset({"key", "keys", "token", "auth", "authorization", "bearer", "cookie", "dsn"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_PORT = r"(?![0-9]+(?:/|$))"  # what follows a host's colon, unless it is a password
_URL_USER = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/@:]*:{_PORT}[^\s'\"]*|[^\s/@:]+)@")
_PARAMETERS = "key|token|secret|sig|signature|password|passwd|pwd|credential|auth|apikey"
_URL_QUERY = re.compile(rf"(?i)([?&#][^=&#\s]*(?:{_PARAMETERS})=)[^&#\s'\"`]+")
# Keys that are known by their look: Hugging Face's, GitHub's, AWS', OpenAI's, Slack's.
_KEY = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{24,}|gh[opsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[0-9A-Z]{16}|sk-[\w-]{24,}|xox[abp]-[\w-]{10,})"
)


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy without secrets: values under keys that name one, and credentials inside URLs."""
    return {
        key: REDACTED if value is not None and _names_a_secret(str(key)) else _redact_value(value)
        for key, value in mapping.items()
    }


def redact_overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line overrides without secrets: `store.api_key=x` becomes `store.api_key=[redacted]`."""
    redacted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        redacted.append(
            f"{key}={REDACTED}" if equals and _names_a_secret(key) else redact_text(f"{key}{equals}{value}")
        )
    return redacted


def redact_text(text: str) -> str:
    """`text` with the credentials of any URL in it replaced, and keys that are known by their look."""
    return _KEY.sub(REDACTED, _URL_QUERY.sub(rf"\1{REDACTED}", _URL_USER.sub(rf"\1{REDACTED}@", text)))


def _redact_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def _names_a_secret(key: str) -> bool:
    words = [word.lower() for word in _WORD.findall(key)]
    return bool(_SECRET_ANYWHERE & set(words)) or (bool(words) and words[-1] in _SECRET_LAST)
