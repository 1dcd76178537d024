"""What the demo shows of a model: its curve, the words it fills in and the nearest words, each beside random weights.

For people: nothing here decides whether a model is good.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.evaluate.baseline import Baseline

_WIDTH, _HEIGHT = 60, 10  # of the drawing, in characters
_GUESSES = 3  # shown for each [MASK]
_NEIGHBOURS = 4  # shown for each word


class Filled(NamedTuple):
    """The most probable words at a sentence's [MASK], with their probabilities."""

    sentence: str
    trained: list[tuple[str, float]]
    random: list[tuple[str, float]]


class Near(NamedTuple):
    """The words whose embeddings are nearest to a word's."""

    word: str
    trained: list[str]
    random: list[str]


def fill_masks(model: Path, sentences: Sequence[str]) -> list[Filled]:
    """What the exported model fills in, and what its architecture does with fresh weights. One [MASK] a sentence."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the NSP head that a masked LM leaves out is no news
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = tokenizer(list(sentences), padding=True, return_tensors="pt")

    def fill(network: Any) -> list[list[tuple[str, float]]]:
        with torch.no_grad():
            logits = network.eval()(**encoded).logits[encoded.input_ids == tokenizer.mask_token_id]
        top = logits.float().softmax(-1).topk(_GUESSES)
        return [
            [(tokenizer.convert_ids_to_tokens(token), probability) for token, probability in zip(*row, strict=True)]
            for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    trained = fill(AutoModelForMaskedLM.from_pretrained(model))
    torch.manual_seed(0)
    random = fill(AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(model)))
    return [Filled(*row) for row in zip(sentences, trained, random, strict=True)]


def nearest_words(model: Path, words: Sequence[str]) -> list[Near]:
    """Of those words that are one token of the vocabulary."""
    from pretrain.evaluate.states import load_encoder, random_encoder
    from pretrain.evaluate.word_vectors import WordVectors

    encoder = load_encoder(model, max_len=8)
    vectors = [WordVectors(one) for one in (encoder, random_encoder(encoder, 0))]
    return [
        Near(word, *([near for near, _ in one.nearest(word, _NEIGHBOURS)] for one in vectors))
        for word in words
        if word in vectors[0].places
    ]


def listed(words: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {probability:.0%}" for word, probability in words)


def draw_curve(rows: Sequence[Mapping[str, Any]], guessing: Baseline) -> list[str]:
    """MLM loss over tokens as lines of ASCII: `*` in training, `o` held out, and what word frequencies alone give.

    `rows` are those of metrics.jsonl. Empty where they hold no loss.
    """
    points = [
        (int(row["tokens"]), float(row[key]), mark)
        for key, mark in (("train/mlm_loss", "*"), ("eval/mlm_loss", "o"))
        for row in rows
        if "tokens" in row and row.get(key) is not None
    ]
    if not points:
        return []
    most = max(max(tokens for tokens, _, _ in points), 1)
    losses = [loss for _, loss, _ in points] + [guessing.mlm_loss]
    low, high = min(losses), max(losses)

    def line_of(loss: float) -> int:
        return round((high - loss) / max(high - low, 1e-9) * (_HEIGHT - 1))

    canvas = [[" "] * (_WIDTH + 1) for _ in range(_HEIGHT)]
    canvas[line_of(guessing.mlm_loss)] = ["-"] * (_WIDTH + 1)
    for tokens, loss, mark in points:
        canvas[line_of(loss)][round(tokens / most * _WIDTH)] = mark
    labels = {0: f"{high:.1f}", _HEIGHT - 1: f"{low:.1f}", line_of(guessing.mlm_loss): f"{guessing.mlm_loss:.1f}"}
    lines = [f"{labels.get(number, ''):>5} |{''.join(row).rstrip()}" for number, row in enumerate(canvas)]
    lines[line_of(guessing.mlm_loss)] += " word frequencies alone"
    return [*lines, f"      +{'-' * (_WIDTH + 1)}", f"       0{f'{most / 1e6:.1f}M tokens':>{_WIDTH}}"]
