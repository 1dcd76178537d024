"""Secrets out of what is written down or sent: configurations, command lines, messages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"

_SECRET_ANYWHERE = frozenset(
    {"secret", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey"}
)
_SECRET_LAST = frozenset({"key", "keys", "token", "auth", "authorization", "bearer", "cookie", "dsn"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_URL_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/@]*:[^\s@]*|[^\s/@]+)@")
_URL_QUERY = re.compile(r"(?i)([?&][^=&\s]*(?:key|token|secret|sig|signature|password|credential)=)[^&\s]+")


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
    """`text` with the credentials of any URL in it replaced."""
    return _URL_QUERY.sub(rf"\1{REDACTED}", _URL_USER.sub(rf"\1{REDACTED}@", text))


def _redact_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def _names_a_secret(key: str) -> bool:
    words = [word.lower() for word in _WORD.findall(key)]
    return bool(_SECRET_ANYWHERE & set(words)) or (bool(words) and words[-1] in _SECRET_LAST)
