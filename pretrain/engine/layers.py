"""What one step does to each layer: the norm of its gradient, and its update against its weights. Of ZeRO stage 0.

There every rank holds whole gradients and fp32 weights, the same ones; elsewhere they are in parts, which other ranks
hold. A step that is not watched costs nothing.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"\.layers?\.(\d+)\.")


def layer_of(name: str) -> str:
    """`0`, `1`, … of a parameter of the encoder's layers; `embeddings`, or `heads` for what comes after them."""
    if found := _LAYER.search(name):
        return found[1]
    return "embeddings" if ".embeddings." in name else "heads"


class LayerWatch:
    """Stands between gradients and weights of an optimizer, before anything is clipped."""

    def __init__(self, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in named_parameters:
            self._layers.setdefault(layer_of(name), []).append(parameter)
        self._before: dict[str, list[Tensor]] = {}
        self._found: dict[str, Tensor] = {}
        self._scale, self._watching = 1.0, False
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def watch(self, loss_scale: float) -> None:
        """Look at the step to come, whose gradients are this times too large."""
        self._scale, self._watching = loss_scale, True

    def read(self) -> dict[str, float]:
        """`layers/NAME/grad_norm` and `layers/NAME/update_ratio` of the step that was watched. Waits for the device."""
        found = {key: float(value) for key, value in self._found.items()}
        self._found = {}
        return found

    def _before_step(self, *_: Any) -> None:
        if not self._watching:
            return
        for layer, parameters in self._layers.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._found[f"layers/{layer}/grad_norm"] = _norm(gradients) / self._scale
            self._before[layer] = [p.detach().clone() for p in parameters]

    def _after_step(self, *_: Any) -> None:
        if not self._watching:
            return
        for layer, before in self._before.items():
            updates = [now.detach() - then for now, then in zip(self._layers[layer], before, strict=True)]
            self._found[f"layers/{layer}/update_ratio"] = _norm(updates) / _norm(before).clamp(min=1e-30)
        self._before, self._watching = {}, False


def _norm(tensors: list[Tensor]) -> Tensor:
    """Of all their elements together, f64: row by row in fp32, then in fp64 (engine.py says why)."""
    rows = [torch.linalg.vector_norm(tensor, dim=-1) for tensor in tensors]
    squares = [torch.linalg.vector_norm(row, dtype=torch.float64).square() for row in rows]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
