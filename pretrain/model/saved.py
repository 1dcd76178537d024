"""The model of a configuration that was saved, perhaps by an older Cloze."""

from dataclasses import asdict

import yaml

from cloze import cli
from pretrain.config import ModelConfig, TrainConfig


def saved_model(config_yaml: str) -> ModelConfig:
    """Keys that are newer than it keep today's defaults."""
    today = cli.compose("train", TrainConfig, ["run=any", "data.path=any"]).model
    return cli.typed({**asdict(today), **yaml.safe_load(config_yaml)["model"]}, ModelConfig)
