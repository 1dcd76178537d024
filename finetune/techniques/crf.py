"""A linear-chain conditional random field upon emissions, and where its weights stand in a written model.

Shapes: B sentences, T positions (words of a sentence in order, then padding), L tags.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.tasks import IGNORED

_PREFIX, _ALONE = "crf.", "crf.safetensors"


class Crf(nn.Module):
    """A linear-chain conditional random field over emissions (Lample et al. 2016, section 2.2)."""

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.start, self.end = nn.Parameter(torch.zeros(num_tags)), nn.Parameter(torch.zeros(num_tags))
        self.transitions = nn.Parameter(torch.zeros(num_tags, num_tags))  # [from, to]

    def forward(self, emissions_BTL: Tensor, tags_BT: Tensor) -> Tensor:
        """Negative log-likelihood per word. Positions whose tag is `IGNORED` are passed over, wherever they stand."""
        order_BT = (tags_BT == IGNORED).to(torch.uint8).argsort(dim=1, stable=True)  # words first, as the chain needs
        tags_BT = tags_BT.gather(1, order_BT)
        emissions_BTL = emissions_BTL.gather(1, order_BT[..., None].expand_as(emissions_BTL))
        known_BT, tags_BT = tags_BT != IGNORED, tags_BT.clamp(min=0)
        last_B = (known_BT.sum(1) - 1).clamp(min=0)
        moves_BT = self.transitions[tags_BT[:, :-1], tags_BT[:, 1:]] * known_BT[:, 1:]
        own_BT = emissions_BTL.gather(2, tags_BT[..., None]).squeeze(2) * known_BT
        ends_B = self.start[tags_BT[:, 0]] + self.end[tags_BT.gather(1, last_B[:, None]).squeeze(1)]
        paths_BL = self.start + emissions_BTL[:, 0]
        for t in range(1, tags_BT.shape[1]):
            longer_BL = (paths_BL[:, :, None] + self.transitions).logsumexp(1) + emissions_BTL[:, t]
            paths_BL = torch.where(known_BT[:, t, None], longer_BL, paths_BL)
        all_B = (paths_BL + self.end).logsumexp(1)
        likelihoods_B = own_BT.sum(1) + moves_BT.sum(1) + ends_B - all_B
        return -likelihoods_B[known_BT[:, 0]].sum() / known_BT.sum()

    @torch.no_grad()
    def best(self, emissions_TL: Tensor) -> list[int]:
        """The most probable tags of one sentence (Viterbi 1967)."""
        paths_L, back = self.start + emissions_TL[0], []
        for emission_L in emissions_TL[1:]:
            scores_LL = paths_L[:, None] + self.transitions
            back.append(scores_LL.argmax(0))
            paths_L = scores_LL.amax(0) + emission_L
        tags = [int((paths_L + self.end).argmax())]
        for from_L in reversed(back):
            tags.append(int(from_L[tags[-1]]))
        return tags[::-1]


def crf_of(folder: Path | None, num_tags: int) -> Crf:
    """The CRF of the model in `folder`, or a new one where it has none for so many tags."""
    crf, there = Crf(num_tags), weights_of(folder) if folder else {}
    own = {name: there.get(f"{_PREFIX}{name}") for name in crf.state_dict()}
    if all(value is not None and value.shape[-1] == num_tags for value in own.values()):
        crf.load_state_dict(own)
    return crf


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Those of the CRF in the model's file, or of `save` beside an ONNX model; none where it has none."""
    for path in (folder / "model.safetensors", folder / _ALONE):
        if path.is_file():
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(_PREFIX)}  # noqa: SIM118
    return {}


def save(crf: Crf, folder: Path) -> None:
    """For a model whose own file cannot hold it."""
    save_file({f"{_PREFIX}{name}": value for name, value in crf.state_dict().items()}, folder / _ALONE)
