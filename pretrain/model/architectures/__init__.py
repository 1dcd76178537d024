"""The architectures: each is a module here with its `BLUEPRINT`, found by its name in `model.architecture`.

Nothing lists them but `pretrain.config.Architecture`, which is known without torch.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module

from pretrain.config import Architecture
from pretrain.model.blueprint import Blueprint


def blueprint_of(architecture: Architecture) -> Blueprint:
    """That of `model.architecture`."""
    found: Blueprint = import_module(f"{__name__}.{architecture.value}").BLUEPRINT
    return found


@cache
def by_model_type() -> Mapping[str, Blueprint]:
    """By the `model_type` of a config.json."""
    blueprints = [blueprint_of(architecture) for architecture in Architecture]
    return {kind: blueprint for blueprint in blueprints for kind in blueprint.model_types}
