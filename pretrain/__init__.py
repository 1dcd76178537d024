"""Shards -> a pretrained BERT, under DeepSpeed ZeRO. `python -m pretrain.train --help`."""
