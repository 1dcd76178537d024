"""Word embeddings that are the masked-LM head's weights, too, on a CPU: their rows' gradients are added to the head's.

Autograd would fill a table with zeros, add the rows to it and then the table to the head's gradient: for 30,522 words
of width 256 that is three times 31 MB, whatever the batch. A sparse gradient of the rows it adds in place, row by row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class TiedEmbedding(nn.Embedding):
    """An embedding whose weight gets a dense gradient from elsewhere in every backward pass, so that the sum is dense.

    In fp32 only: in bf16 a row that comes many times would be rounded off against the head's gradient each time.
    """

    def forward(self, input: Tensor) -> Tensor:
        sparse = self.weight.dtype is torch.float32
        return F.embedding(input, self.weight, self.padding_idx, sparse=sparse)


def add_rows_in_place(hf: PreTrainedModel) -> None:
    """Let the word embeddings be one of these where the head has the same weights."""
    table = hf.get_input_embeddings()
    if type(table) is nn.Embedding and table.weight is hf.get_output_embeddings().weight:
        table.__class__ = TiedEmbedding  # parameters, hooks and names stay
