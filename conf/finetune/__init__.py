"""YAML of `python -m finetune`: a folder of its own, since `model` is a group for training and a directory here."""
