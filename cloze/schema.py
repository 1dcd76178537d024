"""How a configuration dataclass says what a field means: `steps: int = doc("optimizer steps")`.

The text is what `--help` prints. Fields have no defaults: the values stand in `conf/`, in one place.
"""

from dataclasses import field
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parents[1] / "conf"  # beside the packages, installed too: no other `conf` is imported


def doc(text: str) -> Any:
    """A dataclass field without a default whose meaning (and unit) is `text`."""
    return field(metadata={"help": text})
