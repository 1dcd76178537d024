"""Contrastive learning: a text's vector is to be nearest to that of the text that belongs to it, of all in the batch.

The other texts of a batch, of all ranks, are the negatives (Henderson et al. 2017, section 4), and so are the hard ones
that come with a pair. Shapes: N anchors, C candidates, M texts, H width, T tokens.
"""

import torch
import torch.distributed
from torch import Tensor

TEMPERATURE = 0.05  # of cosines (Gao et al. 2021, table D.1)


def contrastive_loss(anchors_NH: Tensor, candidates_CH: Tensor, same_NC: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, eq. 4): cross-entropy of cosines over `temperature`.

    Candidate i, of the first N, belongs to anchor i. `same_NC`: which candidates are the same text as that one, and so
    are no negatives.
    """
    anchors_NH, candidates_CH = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (anchors_NH, candidates_CH))
    right_N = torch.arange(len(anchors_NH), device=anchors_NH.device)
    scores_NC = anchors_NH @ candidates_CH.T / temperature
    others_NC = same_NC.clone()
    others_NC[right_N, right_N] = False
    return torch.nn.functional.cross_entropy(scores_NC.masked_fill(others_NC, -torch.inf), right_N)


def batch_loss(vectors_MH: Tensor, input_ids_MT: Tensor, pad_id: int, num_anchors: int, temperature: float) -> Tensor:
    """The loss of a batch: N anchors, then the N texts that belong to them, then hard negatives.

    Under several ranks it is that of all ranks' texts together. Gradients flow to this rank's own, and are scaled so
    that their mean over the ranks, which data-parallel training takes, is the gradient of this loss.
    """
    hashes_M = text_hashes(input_ids_MT, pad_id)
    parts_H, parts_M = list(torch.split(vectors_MH, num_anchors)), list(torch.split(hashes_M, num_anchors))
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world_size > 1:
        parts_H, parts_M = [of_all_ranks(part) for part in parts_H], [of_all_ranks(part) for part in parts_M]
    hashes_C = torch.cat(parts_M[1:])
    same_NC = parts_M[1][:, None] == hashes_C
    loss = contrastive_loss(parts_H[0], torch.cat(parts_H[1:]), same_NC, temperature)
    return loss + (world_size - 1) * (loss - loss.detach())  # the value of one, the gradient of all


def of_all_ranks(own: Tensor) -> Tensor:
    """The rows of every rank, by rank; equally many each. Only the own ones have a gradient."""
    gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, own.detach().contiguous())
    gathered[torch.distributed.get_rank()] = own
    return torch.cat(gathered)


def text_hashes(input_ids_MT: Tensor, pad_id: int) -> Tensor:
    """A number for each text, i64 [M]: the same for the same tokens, whatever the padding."""
    hashes_M = torch.zeros(len(input_ids_MT), dtype=torch.int64, device=input_ids_MT.device)
    for ids_M in input_ids_MT.T:  # a polynomial modulo 2^64
        hashes_M = torch.where(ids_M == pad_id, hashes_M, hashes_M * 6364136223846793005 + ids_M + 1)
    return hashes_M
