"""Corpus -> WebDataset shards. Runs without torch. `python -m data_prep --help`."""
