"""Micro-batches for loops that are not ours: a torch `Dataset`, and padding for models that know no packed rows."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cloze.errors import UserError
from cloze.storage import on_disk
from pretrain.data.loader import IGNORED, Layout, MicroBatch, MicroBatches


class MicroBatchDataset(Dataset[MicroBatch]):
    """`dataset[i]` is micro-batch i of a rank, as training with this seed reads it: packed, masked, shuffled.

    It never ends: epochs follow one another, each in an order and with masks of its own. An optimizer step takes
    `accumulation` micro-batches. Needs no state: to resume is to begin at another i. Raises `UserError` where there
    is no corpus, the sizes do not fit each other, or, when an item is read, a shard is damaged.
    """

    def __init__(
        self,
        path: str,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if min(micro_batch_size, global_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise UserError(
                f"micro_batch_size={micro_batch_size}, global_batch_size={global_batch_size}, rank={rank}, "
                f"world_size={world_size}: sizes must be at least 1, and the rank below world_size"
            )
        if global_batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"global_batch_size={global_batch_size}: not a multiple of micro_batch_size={micro_batch_size} x "
                f"{world_size} ranks; change one of them"
            )
        layout = Layout(rank, world_size, micro_batch_size, global_batch_size)
        self.accumulation = layout.accumulation
        self._batches = MicroBatches(on_disk(str(path)), seed, layout)

    def __getitem__(self, index: int) -> MicroBatch:
        batch = self._batches[index]
        if isinstance(batch, UserError):
            raise batch
        return batch


def padded(batch: MicroBatch) -> dict[str, Tensor]:
    """A micro-batch as Hugging Face's models take it, i64 [N, L] for N samples, the longest of L tokens.

    `input_ids` (masks applied; 0 where there is no token), `attention_mask`, `token_type_ids`, `labels` (the answer at
    masked positions, -100 elsewhere) and `next_sentence_label` [N], which is all zeros where the corpus has no pairs.
    """
    lengths_N = batch.cu_seqlens.diff().long()
    rows_T = torch.repeat_interleave(torch.arange(len(lengths_N), device=lengths_N.device), lengths_N)
    columns_T = batch.position_ids_T[: len(rows_T)]  # what follows belongs to no sample
    shape = len(lengths_N), int(lengths_N.max())

    def filled(values: Tensor | int, fill: int = 0, of: slice | Tensor = slice(None)) -> Tensor:
        result = rows_T.new_full(shape, fill)
        result[rows_T[of], columns_T[of]] = values
        return result

    masked_M = batch.masked_index_M[: batch.num_masked]
    return {
        "input_ids": filled(batch.input_ids_T[: len(rows_T)]),
        "attention_mask": filled(1),
        "token_type_ids": filled(batch.token_type_ids_T[: len(rows_T)]),
        "labels": filled(batch.mlm_labels_M[: batch.num_masked], IGNORED, masked_M),
        "next_sentence_label": batch.nsp_labels_N,
    }
