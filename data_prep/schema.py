"""How a configuration dataclass says what a field means: `steps: int = doc("optimizer steps")`.

The text is what `--help` prints. Fields have no defaults: the values stand in `conf/`, in one place.
"""

from dataclasses import field
from typing import Any


def doc(text: str) -> Any:
    """A dataclass field without a default whose meaning (and unit) is `text`."""
    return field(metadata={"help": text})
