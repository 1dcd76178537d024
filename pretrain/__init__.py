"""Pretraining: a corpus -> checkpoints and a Hugging Face model. `pretrain.train.main(["run=x", "data.path=y"])`.

`data` deals samples to ranks, `model`, `optim` and `engine` make a step of them, `checkpoint` keeps the state,
`telemetry` tells of the run, `export` and `evaluate` use what came of it. Stands on `cloze` alone.
"""
