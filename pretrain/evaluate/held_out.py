"""Held-out MLM and NSP, exact over ranks: the same samples and masks every time, counted once each."""

import math
from collections.abc import Callable

import numpy as np
import torch

from cloze.corpus.manifest import val_name
from pretrain.config import TrainConfig
from pretrain.data.loader import TrainingCorpus, bounded
from pretrain.dist import Process
from pretrain.engine.engine import Engine
from pretrain.model.loss import means, pretraining_loss


def evaluate(
    engine: Engine, corpus: TrainingCorpus, config: TrainConfig, process: Process, tick: Callable[[], None]
) -> dict[str, float]:
    """`eval/mlm_loss`, `eval/mlm_accuracy`, `eval/nsp_loss`, `eval/nsp_accuracy`, `eval/loss`; {} without a val split.

    Of the split that a val source NAME made, `eval/NAME/mlm_loss` and so on; of a mixture's corpus NAME, too, and
    without NAME the mean over its corpora. Collective; `tick` is called after each micro-batch.
    """
    by_split = {
        split: _evaluate(engine, corpus, split, config, process, tick)
        for split, samples in corpus.held_out.items()
        if samples
    }
    result: dict[str, float] = {}
    for split, found in by_split.items():
        place = f"eval/{name}" if (name := val_name(split)) else "eval"
        result |= {f"{place}/{measure}": value for measure, value in found.items()}
    averaged = [by_split[split] for split in corpus.averaged if split in by_split]
    for measure in averaged[0] if averaged else ():
        result[f"eval/{measure}"] = sum(found[measure] for found in averaged) / len(averaged)
    return result


def _evaluate(
    engine: Engine, corpus: TrainingCorpus, split: str, config: TrainConfig, process: Process, tick: Callable[[], None]
) -> dict[str, float]:
    """The means of one split, of its first `eval.max_samples` samples.

    Every rank runs equally many micro-batches, as ZeRO 3 demands; one without samples left runs sample 0 again and
    does not count it.
    """
    total = min(corpus.held_out[split], config.eval.max_samples or corpus.held_out[split])
    size = config.micro_batch_size
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    masked = pairs = 0
    for round_number in range(math.ceil(total / (size * process.world_size))):
        first = (round_number * process.world_size + process.rank) * size
        indices = np.arange(first, min(first + size, total), dtype=np.int64)
        batch = bounded(corpus.val_batch(indices if len(indices) else np.zeros(1, np.int64), split))
        logits = engine.evaluate(batch.to(process.device))
        if len(indices):
            labels = batch.mlm_labels_M.to(process.device), batch.nsp_labels_N.to(process.device)
            sums += pretraining_loss(logits, *labels, weights=config.loss, masked=1, pairs=1).sums
            masked += batch.num_masked
            pairs += len(indices) if corpus.has_pairs else 0
        tick()
    *added, masked_all, pairs_all = process.add([*sums.tolist(), masked, pairs])
    return means(added, weights=config.loss, masked=int(masked_all), pairs=int(pairs_all))
