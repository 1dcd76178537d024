"""Training on word embeddings that are disturbed for the worse: FGM (Miyato et al. 2017), PGD (Madry et al. 2018)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finetune.keys import Adversary, AdversaryConfig


def ascent(gradient: Tensor, length: float) -> Tensor:
    """`gradient` scaled to the L2 norm `length`; zeros stay zeros."""
    norm = gradient.norm()
    return gradient * (length / norm) if norm > 0 else torch.zeros_like(gradient)


def add_adversarial_gradients(model: Any, config: AdversaryConfig, backward: Callable[[], object]) -> None:
    """After a clean backward pass, add the gradients of the same batch at the worst word embeddings nearby.

    `backward` does forward and backward on that batch. Embeddings and clean gradients are as before when this returns.
    """
    words = model.get_input_embeddings().weight
    kept = words.detach().clone()
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    one_step = config.kind is Adversary.fgm
    num_steps, size = (1, config.epsilon) if one_step else (config.steps, config.step_size)
    gradient = words.grad
    for step in range(num_steps):
        with torch.no_grad():
            words.add_(ascent(gradient, size))
            moved = words - kept
            if moved.norm() > config.epsilon:
                words.copy_(kept + ascent(moved, config.epsilon))
        for parameter, clean in gradients.items():
            # Learned from: the clean batch and the last disturbance.
            parameter.grad = clean if step == num_steps - 1 else None
        backward()
        gradient = words.grad
    with torch.no_grad():
        words.copy_(kept)
