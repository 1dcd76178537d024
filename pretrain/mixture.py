"""What a mixture of corpora is made of: which corpora, and how much of each over the run. Pure.

`data.mixture` is a list of corpora, each with a weight: a number or a curve. Weights are shares of the samples, of what
their sum is. Without weights they follow from the corpora's sizes, to the power of `data.temperature` (Devlin 2018,
multilingual BERT; Conneau et al. 2020, section 3.1; as a curve Marone et al. 2025, mmBERT).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from cloze.errors import UserError
from pretrain.curves import Curve, is_curve, parse_curve, shares_that_tell

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_KEYS = ("path", "weight", "name")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One corpus of a mixture."""

    path: str
    name: str  # in metrics: `eval/NAME/mlm_loss`
    weight: Curve | None  # None: by its size


def parse_mixture(value: Any) -> tuple[Part, ...]:
    """`data.mixture` as it is written. Raises `UserError` for anything that is none."""
    shape = "data.mixture: is no list of corpora, such as [{path:shards/en,weight:0.7},{path:shards/de,weight:0.3}]"
    if not is_curve(value) or not value or not all(isinstance(item, Mapping) for item in value):
        raise UserError(shape)
    parts = tuple(_part(item) for item in value)
    names = sorted(part.name for part in parts)
    for one, other in pairwise(names):
        if one == other:
            raise UserError(f"data.mixture: two corpora are called {one}; give each a name, as {{path:…,name:old}}")
    if len({part.weight is None for part in parts}) > 1:
        bare = next(part.name for part in parts if part.weight is None)
        raise UserError(f"data.mixture: {bare} has no weight, and others have one; give all of them one, or none")
    weights = [part.weight for part in parts if part.weight]
    for share in shares_that_tell(*weights):
        if weights and not any(weight.at(share) for weight in weights):
            raise UserError(f"data.mixture: all weights are 0 at {share:g} of the run; there is nothing to train on")
    return parts


def _part(item: Mapping[str, Any]) -> Part:
    if unknown := [key for key in item if key not in _KEYS]:
        raise UserError(f"data.mixture: a corpus has no {unknown[0]}; there are {', '.join(_KEYS)}")
    path = item.get("path")
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"data.mixture: {dict(item)} has no path; give it one, as {{path:shards/en,weight:0.7}}")
    name = item.get("name", path.rstrip("/").rpartition("/")[2])
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"data.mixture: {path} has the name {name!r}, which is none for metrics; add name= with letters, digits, "
            "dots, dashes"
        )
    weight = item.get("weight")
    key = f"data.mixture.{name}"
    return Part(path=path, name=name, weight=None if weight is None else parse_curve(weight, key, least=0.0))


class Weights(NamedTuple):
    """Of each corpus of a mixture, over the run."""

    curves: tuple[Curve, ...]  # (): by size
    sizes: tuple[float, ...]  # samples of a mean pass
    temperature: Curve

    @classmethod
    def of(cls, parts: Sequence[Part], sizes: Sequence[float], temperature: Curve) -> "Weights":
        return cls(tuple(part.weight for part in parts if part.weight), tuple(sizes), temperature)

    @property
    def is_constant(self) -> bool:
        return all(curve.is_constant for curve in self.curves or (self.temperature,))

    def shares(self, share: float) -> list[float]:
        """Of each corpus, of 1 together, when this share of the run is done."""
        if self.curves:
            values = [curve.at(share) for curve in self.curves]
        else:  # of the largest, so that no power is too large
            power, most = self.temperature.at(share), max(self.sizes)
            values = [(size / most) ** power for size in self.sizes]
        total = sum(values)
        return [value / total for value in values]
