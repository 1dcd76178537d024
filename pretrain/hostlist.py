"""Slurm's compressed lists of hosts: `r1i[0-3]n[00-17],login1` names 73 of them. Pure; asks no scontrol."""

import itertools
import re
from collections.abc import Iterator

from cloze.errors import UserError

_ITEM = r"(?:[^,\[\]\s]|\[[^\[\]\s]+\])+"  # a host, or several: text and brackets, in any order
_LIST = re.compile(rf"{_ITEM}(?:,{_ITEM})*")
_PART = re.compile(r"([^\[\]]+)|\[([^\[\]]+)\]")


def hosts_of(nodelist: str) -> Iterator[str]:
    """The hosts in order, as `scontrol show hostnames` prints them.

    Of several brackets the last runs fastest, then the first, the second, …: Slurm 22.05 takes the last but one apart
    first. Lazy: the first host is found at once, however many there are. Raises `UserError` for what is no such list.
    """
    if not _LIST.fullmatch(nodelist):
        raise UserError(f"{nodelist!r}: not a list of hosts as Slurm writes it; give MASTER_ADDR=HOST, that of rank 0")
    for item in re.findall(_ITEM, nodelist):
        parts = [[text] if text else list(_numbers(numbers, nodelist)) for text, numbers in _PART.findall(item)]
        brackets = [number for number in range(len(parts)) if len(parts[number]) > 1]
        slowest_first = [*reversed(brackets[:-1]), *brackets[-1:]]
        for choice in itertools.product(*(parts[number] for number in slowest_first)):
            chosen = dict(zip(slowest_first, choice, strict=True))
            yield "".join(chosen.get(number, part[0]) for number, part in enumerate(parts))


def _numbers(text: str, nodelist: str) -> Iterator[str]:
    """`007`, `008`, `11` of `007-008,11`."""
    for piece in text.split(","):
        low, dash, high = piece.partition("-")
        if not dash:
            yield piece
        elif low.isdecimal() and high.isdecimal() and int(low) <= int(high):
            yield from (f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1))
        else:
            raise UserError(f"{nodelist}: {piece} is no range; give MASTER_ADDR=HOST, that of rank 0")
