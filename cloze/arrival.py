"""Whether a command line arrives as it was typed: launchers hand it to shells on other hosts, which take words apart.

`--checksum=HEX` speaks for all other words. `--encoded=TEXT` is a word that a shell would not leave alone, in letters,
digits, - and _. Knows no keys.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Sequence

from cloze.errors import UserError
from cloze.log import QUIET, VERBOSE

CHECKSUM, ENCODED = "--checksum=", "--encoded="
_SAFE = re.compile(r"[\w./:=,+@-]+", re.ASCII)  # to any shell, and to pdsh, which reads %h


def checksum(words: Iterable[str]) -> str:
    """The argument that lets `opened` see whether these words arrived; how much is told does not count."""
    told = "\0".join(word for word in words if word not in (VERBOSE, QUIET))
    return CHECKSUM + hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def sealed(words: Sequence[str]) -> list[str]:
    """The same words as no shell changes them, and their checksum."""
    return [*(word if _SAFE.fullmatch(word) else _encoded(word) for word in words), checksum(words)]


def _encoded(word: str) -> str:
    return ENCODED + base64.urlsafe_b64encode(word.encode("utf-8", "surrogateescape")).decode().rstrip("=")


def opened(words: Sequence[str]) -> list[str]:
    """What was given to `sealed`, or words that never were. Raises `UserError` for what has changed on the way."""
    given = [word for word in words if word.startswith(CHECKSUM)]
    found = [_decoded(word) for word in words if word not in given]
    if given and {*given} != {checksum(found)}:
        raise UserError(
            f"{given[0]}: the arguments are not those that were typed: a shell on the way has changed them, or some "
            "were added; `python -m launch quote …` prints a command that arrives whole"
        )
    return found


def _decoded(word: str) -> str:
    if not word.startswith(ENCODED):
        return word
    text = word.removeprefix(ENCODED)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode(
            "utf-8", "surrogateescape"
        )
    except (binascii.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{word}: was cut off on the way; `python -m launch quote …` prints the command anew"
        ) from error


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that the `deepspeed` launcher adds on each host (DeepSpeed issue 5357)."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def later_wins(words: Iterable[str]) -> list[str]:
    """The words without those whose key comes again."""
    return list({word.partition("=")[0]: word for word in words}.values())


def refuse_given_twice(words: Iterable[str]) -> None:
    """Raises `UserError` for a key with two values, such as a shell makes of `a={b:{c:1,d:2}}`: one would be lost."""
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and not word.startswith(("-", "~")) and values.setdefault(key := key.lstrip("+"), value) != value:
            raise UserError(
                f"{key}: given twice, as {values[key]} and as {value}; give it once (in quotes, where it has braces: a "
                "shell takes {a,b} apart)"
            )
