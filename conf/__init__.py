"""Hydra YAML, values only: what the keys mean and which values are valid stands in each package's `config.py`."""
