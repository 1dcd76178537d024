"""How a configuration dataclass says what a field means: `steps: int = doc("optimizer steps")`.

The text is what `--help` prints. Fields have no defaults: the values stand in `conf/`, in one place. A section whose
keys depend on a choice is a `Variant`. A field `in_` is the key `in`, a word that Python keeps for itself.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cloze.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"  # beside the packages, installed too: no other `conf` is imported


def doc(text: str) -> Any:
    """A dataclass field without a default whose meaning (and unit) is `text`."""
    return field(metadata={"help": text})


def require(condition: bool, message: str) -> None:
    """A check of a value: raises `UserError` unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Base of a section that comes in kinds, each with keys of its own.

        @dataclass(frozen=True, kw_only=True)
        class ShapeConfig(Variant):  # the section: what every kind has
            colour: str = doc("name of a colour")

        @dataclass(frozen=True, kw_only=True)
        class CircleConfig(ShapeConfig, kind="circle"):  # a kind: what it alone has
            radius: float = doc("metres")

    A field `shape: ShapeConfig` then takes `conf/shape/circle.yaml`, whose `kind: circle` makes it a `CircleConfig`:
    `--help` shows the keys of the chosen kind, and a key of another one is refused (`cloze.cli`).
    """

    kinds: ClassVar[dict[str, type[Any]]] = {}  # of this section, by name; a module of a kind adds it when imported

    kind: str = doc("one of")

    def __init_subclass__(cls, kind: str | None = None) -> None:
        if Variant in cls.__bases__:
            cls.kinds = {}
        if kind is not None:
            cls.kinds[kind] = cls
