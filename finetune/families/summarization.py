"""Extractive summaries: each sentence of a document gets a [CLS], whose class says whether the summary has it.

After BertSum (Liu 2019). A document is JSON with `sentences` and `summary`; which sentences to learn is found by adding
greedily what raises ROUGE most (Nallapati et al. 2017, section 3.1).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.data import BadRow, Dataset, both_sets, more_sets
from finetune.families.qa import normal_words
from finetune.predictor import Encoded, Predictor, Trained, chosen, strings_of
from finetune.readers import Row
from finetune.tasks import IGNORED, EvaluationSet, Family, Prepared, Scores, Task, TaskConfig

_NAMES = ["left out", "summary"]
_METRICS = ("rouge1", "rouge2", "rougeL")


class Document(NamedTuple):
    sentences: tuple[str, ...]
    summary: str


class _Words:
    """How ROUGE cuts text: words, and single ideographs, which rouge-score's own tokenizer drops."""

    def tokenize(self, text: str) -> list[str]:
        return normal_words(text)


def documents(dataset: Dataset) -> list[Document]:
    """Sentences and summary of each document; a summary may be a list of sentences too."""
    return dataset.convert(_document)


def _document(row: Row) -> Document:
    sentences, summary = row.columns.get("sentences"), row.columns.get("summary")
    if not (isinstance(sentences, list) and sentences and "summary" in row.columns):
        raise BadRow(f"sentences (a list) and summary are needed, there are {', '.join(row.columns)}")
    text = " ".join(map(str, summary)) if isinstance(summary, list) else summary
    if not (isinstance(text, str) and text.strip()):
        raise BadRow(f"summary is {json.dumps(summary)[:40]}; a text is needed there, or a list of texts")
    if not any(str(sentence).strip() for sentence in sentences):
        raise BadRow("its sentences are blank")
    return Document(tuple(map(str, sentences)), text)


def prepare(config: TaskConfig) -> Prepared:
    """Shapes of predictions: [N, T, 2] logits; the `top_sentences` likeliest are taken, in the document's order."""
    from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

    from finetune.models import load_encoder_tokenizer, load_model, load_teacher

    train, dev = (documents(dataset) for dataset in both_sets(config))
    more = {name: documents(dataset) for name, dataset in more_sets(config).items()}
    tokenizer, most = load_encoder_tokenizer(config), config.top_sentences

    def questioned(dataset: Sequence[Document]) -> EvaluationSet:
        return _evaluation_set(dataset, encoded(dataset, tokenizer, config.max_len, most), most)

    return Prepared(
        tokenizer=tokenizer,
        make_model=lambda: load_model(config, AutoModelForTokenClassification, _NAMES),
        train=encoded(train, tokenizer, config.max_len, most),
        dev=questioned(dev),
        more={name: questioned(dataset) for name, dataset in more.items()},
        collate=DataCollatorForTokenClassification(tokenizer),
        num_labels=2,
        teacher=load_teacher(config, AutoModelForTokenClassification, _NAMES, tokenizer),
    )


def _evaluation_set(dataset: Sequence[Document], features: Sequence[dict[str, Any]], most: int) -> EvaluationSet:
    """Answers are summaries; guessed are the leading sentences, which are hard to beat in news."""
    gold = [document.summary for document in dataset]
    leading = [" ".join(document.sentences[:most]) for document in dataset]

    def decide(logits_NT2: npt.NDArray[np.float32], _: Any) -> list[str]:
        summaries = []
        for logits_T2, feature, document in zip(logits_NT2, features, dataset, strict=True):
            known_T = np.asarray(feature["labels"]) != IGNORED
            margins = (logits_T2[: len(known_T), 1] - logits_T2[: len(known_T), 0])[known_T]
            chosen = sorted(np.argsort(-margins, kind="stable")[:most])
            summaries.append(" ".join(document.sentences[i] for i in chosen))
        return summaries

    lead = rouge(leading, gold)["rougeL"]
    return EvaluationSet(
        features=features,
        decide=decide,
        score=lambda summaries: {**rouge(summaries, gold), "lead_rougeL": lead},
        shown=[{"sentences": [*document.sentences], "summary": document.summary} for document in dataset],
        guess=leading,
    )


def predictor(trained: Trained, first: Row) -> Predictor:
    """The sentences that the summary has, in the document's order."""
    (column,) = chosen(trained.layouts or (("sentences",),), first)
    return Predictor(
        auto_class="AutoModelForTokenClassification",
        adds=("prediction",),
        encode=lambda rows: _encoded_rows(rows, column, trained),
    )


def _encoded_rows(rows: Sequence[Row], column: str, trained: Trained) -> Encoded:
    found = [Document(tuple(strings_of(row, column)), "") for row in rows]
    features = encoded(found, trained.tokenizer, trained.max_len, 0)
    heads = [np.flatnonzero(np.asarray(feature.pop("labels")) != IGNORED) for feature in features]

    def answers(margins: Sequence[npt.NDArray[np.float32]]) -> list[dict[str, Any]]:
        chosen = [sorted(np.argsort(-own, kind="stable")[: trained.top_sentences]) for own in margins]
        return [
            {"prediction": " ".join(document.sentences[i] for i in own)}
            for document, own in zip(found, chosen, strict=True)
        ]

    return Encoded(
        features,
        lambda number, outputs: outputs[0][heads[number], 1] - outputs[0][heads[number], 0],
        answers,
        cut=[
            n for n, (document, own) in enumerate(zip(found, heads, strict=True)) if len(own) < len(document.sentences)
        ],
        empty=[number for number, document in enumerate(found) if not any(map(str.strip, document.sentences))],
    )


def rouge(summaries: Sequence[str], gold: Sequence[str]) -> Scores:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), by rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_METRICS), tokenizer=_Words())
    found = [scorer.score(right, summary) for right, summary in zip(gold, summaries, strict=True)]
    return {name: float(np.mean([scores[name].fmeasure for scores in found])) for name in _METRICS}


def oracle(document: Document, most: int) -> list[int]:
    """The sentences, at most so many, that add to ROUGE-1 and ROUGE-2 one after another."""
    wanted = _grams(normal_words(document.summary))
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < min(most, len(document.sentences)):
        values = []
        for i in sorted({*range(len(document.sentences))} - {*chosen}):
            words = [normal_words(document.sentences[j]) for j in sorted([*chosen, i])]
            values.append((_overlap(_grams([word for sentence in words for word in sentence]), wanted), -i))
        value, negative = max(values)
        if value <= best:
            break
        best = value
        chosen.append(-negative)
    return sorted(chosen)


def _grams(words: Sequence[str]) -> tuple[Counter[Any], Counter[Any]]:
    return Counter(words), Counter(pairwise(words))


def _overlap(given: tuple[Counter[Any], Counter[Any]], wanted: tuple[Counter[Any], Counter[Any]]) -> float:
    pairs = zip(given, wanted, strict=True)
    return sum(2 * (a & b).total() / max(1, a.total() + b.total()) for a, b in pairs)


def encoded(dataset: Sequence[Document], tokenizer: Any, max_len: int, most: int) -> list[dict[str, Any]]:
    """[CLS] sentence [SEP] for each sentence that fits, segments alternating; each [CLS] bears the label."""
    features = []
    for document in dataset:
        learned = oracle(document, most)
        ids: list[int] = []
        segments: list[int] = []
        labels: list[int] = []
        pieces = tokenizer(list(document.sentences), add_special_tokens=False).input_ids
        for i, sentence in enumerate(pieces):
            own = [tokenizer.cls_token_id, *sentence[: max_len - 2], tokenizer.sep_token_id]
            if len(ids) + len(own) > max_len:
                break
            ids += own
            segments += [i % 2] * len(own)
            labels += [int(i in learned)] + [IGNORED] * (len(own) - 1)
        feature = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": segments}
        known = {name: feature[name] for name in tokenizer.model_input_names}
        features.append({**known, "labels": labels})
    return features


_USAGE = """import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForTokenClassification.from_pretrained("{name}").eval()
sentences = ["The first sentence.", "The second one."]
inputs = tokenizer(sentences).input_ids  # a [CLS] before each, whose class tells how much the summary wants it
at = [sum(map(len, inputs[:number])) for number in range(len(inputs))]
segments = [number % 2 for number, ids in enumerate(inputs) for _ in ids]
rows = {{"input_ids": [sum(inputs, [])], "token_type_ids": [segments]}}
with torch.no_grad():
    logits = model(**{{key: torch.tensor(rows[key]) for key in rows if key in tokenizer.model_input_names}}).logits[0]
print(sorted(zip((logits[at, 1] - logits[at, 0]).tolist(), sentences), reverse=True))
"""
SUMMARIZATION = Family(
    prepare=prepare,
    predictor=predictor,
    text=lambda row, columns: row.columns.get("sentences"),
    usage=_USAGE,
    tag="summarization",
    options=frozenset({"loss", "top_sentences"}),
)

TASKS: Mapping[str, Task] = {"summarization": Task(family=SUMMARIZATION, score="rougeL")}
