"""A tag for each word (named entities): a linear head or a conditional random field, scored by whole entities.

Shapes: B sentences, T positions (words of a sentence in order, then padding), L tags.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from finetune.config import FinetuneConfig, Head, Init
from finetune.data import Sentence, both_sets, entities, label_names, sentences
from finetune.techniques import IGNORED
from finetune.train import Prepared, Scores, load_model, load_teacher, max_tokens
from pretrain.export.hugging_face import load_pretrained, load_tokenizer

_HEAD = AutoModelForTokenClassification
_NEVER = -1e4  # the score of a transition out of a position that is not there


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


def load_tagger(folder: Path) -> Any:
    """A written model, with its `crf` if it has one: `model.crf.best(logits of the words' first pieces)`."""
    model = load_pretrained(_HEAD, folder, purpose="a tagger")
    if any(name.startswith("crf.") for name in _weights(folder)):
        model.crf = crf_of(folder, model.config.num_labels)
    return model


def crf_of(folder: Path | None, num_tags: int) -> Crf:
    """The CRF of the model in `folder`, or a new one where it has none for so many tags."""
    crf, weights = Crf(num_tags), _weights(folder) if folder else {}
    own = {name: weights.get(f"crf.{name}") for name in crf.state_dict()}
    if all(value is not None and value.shape[-1] == num_tags for value in own.values()):
        crf.load_state_dict(own)
    return crf


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    return dict(load_file(path)) if path.is_file() else {}


def prepare(config: FinetuneConfig) -> Prepared:
    """Shapes of predictions: [N, T, L] emissions; a word is judged by its first piece, one that was cut off is "O"."""
    train, dev = (sentences(rows, repair=config.data.repair_tags) for rows in both_sets(config))
    tokenizer = load_tokenizer(Path(config.model))
    names = label_names([tag for s in train for tag in s.tags], [tag for s in dev for tag in s.tags], config)
    ids = {name: number for number, name in enumerate(names)}
    limit = max_tokens(config)
    train_features, _ = _encoded(train, ids, tokenizer, limit)
    dev_features, dev_words = _encoded(dev, ids, tokenizer, limit)
    gold = [s.tags for s in dev]

    def make_model() -> Any:
        model = load_model(config, _HEAD, names)
        if config.head is Head.crf:
            model.crf = crf_of(Path(config.model) if config.init is Init.pretrained else None, len(names))
        return model

    def decide(emissions_NTL: npt.NDArray[np.float32], model: Any) -> list[list[str]]:
        predicted = []
        for emissions_TL, feature, words, tags in zip(emissions_NTL, dev_features, dev_words, gold, strict=True):
            guessed = ["O"] * len(tags)
            if words:
                own_TL = emissions_TL[: len(feature["labels"])][np.asarray(feature["labels"]) != IGNORED]
                crf = getattr(model, "crf", None)
                chosen = (
                    own_TL.argmax(-1) if crf is None else crf.best(torch.as_tensor(own_TL, device=crf.start.device))
                )
                for word, number in zip(words, chosen, strict=True):
                    guessed[word] = names[number]
            predicted.append(guessed)
        return predicted

    return Prepared(
        tokenizer=tokenizer,
        make_model=make_model,
        train=train_features,
        dev=dev_features,
        collate=DataCollatorForTokenClassification(tokenizer),
        decide=decide,
        score=lambda answers: entity_scores(gold, answers),
        num_labels=len(names),
        teacher=load_teacher(config, _HEAD, names, tokenizer),
        facts={"dev_examples": len(dev), "labels": names, "head": config.head.value},
    )


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Scores:
    """Precision, recall and F1 of whole entities over all sentences, as CoNLL 2003 has them; accuracy of tags."""
    wanted, given = ([entities(tags) for tags in dataset] for dataset in (gold, predicted))
    right = sum(len(a & b) for a, b in zip(wanted, given, strict=True))
    num_wanted, num_given = sum(map(len, wanted)), sum(map(len, given))
    same = [a == b for tags, guesses in zip(gold, predicted, strict=True) for a, b in zip(tags, guesses, strict=True)]
    return {
        "precision": right / max(1, num_given),
        "recall": right / max(1, num_wanted),
        "f1": 2 * right / max(1, num_wanted + num_given),
        "accuracy": sum(same) / len(same),
    }


def _encoded(
    dataset: Sequence[Sentence], ids: dict[str, int], tokenizer: Any, max_len: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Features with a label at each word's first piece, and which words of each sentence have one."""
    encoded = tokenizer([[*s.words] for s in dataset], is_split_into_words=True, truncation=True, max_length=max_len)
    features, words = [], []
    for i, sentence in enumerate(dataset):
        labels: list[int] = []
        seen: list[int] = []
        for word in encoded.word_ids(i):
            first = word is not None and (not seen or word != seen[-1])
            labels.append(ids[sentence.tags[word]] if first else IGNORED)
            if first:
                seen.append(word)
        features.append({**{key: values[i] for key, values in encoded.items()}, "labels": labels})
        words.append(seen)
    return features, words
