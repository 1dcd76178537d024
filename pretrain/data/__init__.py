"""Samples of a corpus as micro-batches, in an order that is a pure function of the seed.

`MicroBatchDataset` is for anybody's loop; `padded` makes of one of its items what Hugging Face's models take.
"""

from typing import TYPE_CHECKING

from cloze.lazy import exports

if TYPE_CHECKING:
    from pretrain.data.dataset import MicroBatchDataset, padded
    from pretrain.data.loader import MicroBatch

__all__ = ["MicroBatch", "MicroBatchDataset", "padded"]
__getattr__ = exports(
    __name__,
    {
        "MicroBatch": "pretrain.data.loader",
        "MicroBatchDataset": "pretrain.data.dataset",
        "padded": "pretrain.data.dataset",
    },
)
