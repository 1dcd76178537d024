"""Vectors of texts, learned by contrast (finetune/techniques/contrastive.py) and written for sentence-transformers.

Training data are pairs that belong together, perhaps with a hard negative, or single texts, whose pair is the same text
under another draw of dropout (SimCSE: Gao et al. 2021, section 3). `task=embedding` is scored by how well cosines agree
with people's judgement of similarity, `task=retrieval` by whether a text finds the one that belongs to it.
Shapes: N examples, M texts, H width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError
from finetune.data import BadRow, Dataset, both_sets, more_sets, require_two
from finetune.readers import Columns, Layout, Row, read_rows, suffix
from finetune.tasks import EvaluationSet, Family, Prepared, Scores, Task, TaskConfig

_TRIPLE, _PAIR = ("anchor", "positive", "negative"), ("anchor", "positive")
_SINGLES = (("sentence",), ("text",))
JUDGED = (("sentence1", "sentence2", "score"), ("sentence1", "sentence2", "label"))

_SHOWN = 10  # texts that are looked at of those that are found
_BLOCK = 1024  # texts that look at once

Texts = tuple[str, ...]


def read(text: str, path: str, columns: Columns) -> list[Row]:
    """`.txt`: a text on each line. Else as other tasks."""
    if suffix(path) == ".txt":
        lines = enumerate(text.split("\n"), 1)
        return [Row(f"line {number}", {"sentence": line.strip()}) for number, line in lines if line.strip()]
    return read_rows(text, path, columns)


def groups(dataset: Dataset, config: TaskConfig) -> list[Texts]:
    """Of each row the text, what belongs to it, and what does not: as many as there are columns."""
    own = (tuple(config.data.columns),) if config.data.columns else (_TRIPLE, _PAIR, *_SINGLES)
    if len(own[0]) > 3:
        raise UserError(
            f"data.columns={config.data.columns}: one to three names: text, what belongs to it, hard negative"
        )
    layout = _layout(dataset, own)
    return dataset.convert(lambda row: _texts(row, layout))


def judged(dataset: Dataset) -> tuple[list[Texts], list[float]]:
    """Pairs of texts, and how similar people find them."""
    *layout, score = _layout(dataset, JUDGED)

    def parse(row: Row) -> tuple[Texts, float]:
        texts = _texts(row, (*layout, score))
        try:
            return texts[:2], float(texts[2])
        except ValueError:
            raise BadRow(f"{score} is {texts[2][:40]!r}; a number is needed there") from None

    found = dataset.convert(parse)
    return [texts for texts, _ in found], [number for _, number in found]


def _layout(dataset: Dataset, layouts: Sequence[Layout]) -> Layout:
    whole = next((row for row in dataset.rows if not row.fault), None)
    if whole is None:
        return layouts[0]
    found = next((names for names in layouts if {*names} <= whole.columns.keys()), None)
    if found is None:
        wanted = " or ".join(", ".join(names) for names in layouts)
        there = ", ".join(filter(None, whole.columns)) or "none"
        raise UserError(f"{dataset.name}: {whole.place}: the columns {wanted} are needed, there are {there}")
    return found


def _texts(row: Row, layout: Layout) -> Texts:
    for name in layout:
        value = row.columns.get(name)
        if isinstance(value, list | dict) or not str("" if value is None else value).strip():
            raise BadRow(f"{name} is empty or no text; remove the row")
    return tuple(str(row.columns[name]).strip() for name in layout)


def prepare(config: TaskConfig) -> Prepared:
    """Shapes of predictions: [M, H], the vectors of the different texts of data.dev."""
    from pathlib import Path

    import torch
    from transformers import AutoModel

    from finetune.embedder import Embedder, pooling_of
    from finetune.models import load_encoder_tokenizer, load_model
    from finetune.techniques.contrastive import TEMPERATURE, batch_loss
    from pretrain.evaluate.frozen_config import Pooling

    train_set, dev_set = both_sets(config)
    train, dev = groups(train_set, config), _questions(dev_set, config)
    tokenizer = load_encoder_tokenizer(config)
    pooling = config.embedding.pooling or pooling_of(Path(config.model)) or Pooling.mean
    temperature = config.embedding.temperature or TEMPERATURE

    def make_model() -> Any:
        model = Embedder(load_model(config, AutoModel), pooling, config.max_len)
        if len(train[0]) == 1:
            _require_dropout(model)
        return model

    def collate(features: Sequence[Mapping[str, Any]]) -> Any:
        """Anchors, then what belongs to them, then hard negatives: rows of one padded batch."""
        rows = [{key: feature[key] for key in tokenizer.model_input_names} for feature in features]
        for place in range(len(features[0].get("candidates", ()))):
            rows += [feature["candidates"][place] for feature in features]
        return {**tokenizer.pad(rows, return_tensors="pt"), "labels": torch.zeros(len(rows))}  # the Trainer wants some

    num_groups = max(2, len(train[0]))

    def loss(outputs: Any, inputs: Mapping[str, Any]) -> Any:
        if not torch.is_grad_enabled():  # texts of data.dev, which have no pair
            return outputs["vectors"].new_zeros(())
        num_anchors = len(inputs["input_ids"]) // num_groups
        return batch_loss(outputs["vectors"], inputs["input_ids"], tokenizer.pad_token_id, num_anchors, temperature)

    def asked(questions: Similarity | Finding) -> EvaluationSet:
        return EvaluationSet(
            features=_encoded(questions.texts, tokenizer, config.max_len),
            decide=lambda vectors_MH, _: questions.answers(unit(vectors_MH)),
            score=questions.score,
            shown=questions.shown(),
            guess=questions.answers(np.ones((len(questions.texts), 1), np.float32)),  # as if all texts were the same
        )

    return Prepared(
        tokenizer=tokenizer,
        make_model=make_model,
        train=_grouped(train, tokenizer, config.max_len),
        dev=asked(dev),
        more={name: asked(_questions(dataset, config)) for name, dataset in more_sets(config).items()},
        collate=collate,
        loss=loss,
        facts={"pooling": pooling.value, "temperature": temperature},
    )


class Similarity:
    """Judged pairs. The answers are cosines."""

    def __init__(self, pairs: Sequence[Texts], judged_N: Sequence[float]) -> None:
        self.pairs, self._judged_N = pairs, np.asarray(judged_N, np.float64)
        self.texts, self._places_Nx2 = _different(pairs)

    def answers(self, unit_MH: npt.NDArray[np.float32]) -> list[float]:
        first_N, second_N = self._places_Nx2.T
        return [float(cosine) for cosine in (unit_MH[first_N] * unit_MH[second_N]).sum(1)]

    def shown(self) -> list[dict[str, Any]]:
        """For the file of answers."""
        rows = zip(self.pairs, self._judged_N.tolist(), strict=True)
        return [{"sentence1": one, "sentence2": other, "score": score} for (one, other), score in rows]

    def score(self, cosines: Sequence[float]) -> Scores:
        """Spearman's and Pearson's correlation with judgement; 0 where either does not vary."""
        from finetune.families.classification import correlations

        found = correlations(self._judged_N, np.asarray(cosines, np.float64))
        return {name: found[name] for name in ("spearman", "pearson")}


class Finding:
    """Pairs, of which the first looks for the second among those of all. The answers are the ten that it finds."""

    def __init__(self, pairs: Sequence[Texts]) -> None:
        self.pairs = pairs
        self.texts, self._places_Nx2 = _different(pairs)

    def answers(self, unit_MH: npt.NDArray[np.float32]) -> list[list[str]]:
        candidates = np.unique(self._places_Nx2[:, 1])
        found: list[list[str]] = []
        for start in range(0, len(self.pairs), _BLOCK):
            scores_BC = unit_MH[self._places_Nx2[start : start + _BLOCK, 0]] @ unit_MH[candidates].T
            order_BK = np.argsort(-scores_BC, axis=1, kind="stable")[:, :_SHOWN]
            found += [[self.texts[place] for place in candidates[row]] for row in order_BK]
        return found

    def shown(self) -> list[dict[str, Any]]:
        """For the file of answers."""
        return [{"anchor": anchor, "positive": positive} for anchor, positive, *_ in self.pairs]

    def score(self, answers: Sequence[Sequence[str]]) -> Scores:
        """nDCG@10 (one text is right: 1 / log2(1 + rank)), recall@1 and recall@10."""
        right = [pair[1] for pair in self.pairs]
        ranks = [found.index(text) + 1 if text in found else 0 for found, text in zip(answers, right, strict=True)]
        return {
            "ndcg@10": float(np.mean([1 / np.log2(rank + 1) if rank else 0 for rank in ranks])),
            "recall@1": float(np.mean([rank == 1 for rank in ranks])),
            "recall@10": float(np.mean([rank > 0 for rank in ranks])),
        }


def _questions(dataset: Dataset, config: TaskConfig) -> Similarity | Finding:
    if config.task == "embedding":
        pairs, numbers = judged(dataset)
        require_two(dataset, numbers, "scores would say nothing")
        return Similarity(pairs, numbers)
    found = [texts[:2] for texts in groups(dataset, config)]
    if len(found[0]) < 2:
        raise UserError(f"{dataset.name}: pairs are needed, anchor and positive; single texts cannot be scored")
    return Finding(found)


def _different(pairs: Sequence[Texts]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The different texts of all pairs, and the places of each pair's among them, [N, 2]."""
    places: dict[str, int] = {}
    found = [[places.setdefault(text, len(places)) for text in pair] for pair in pairs]
    return list(places), np.asarray(found, np.int64)


def unit(vectors_MH: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of length 1; those of length 0 stay."""
    return np.asarray(vectors_MH / np.maximum(np.linalg.norm(vectors_MH, axis=1, keepdims=True), 1e-12), np.float32)


def _grouped(dataset: Sequence[Texts], tokenizer: Any, max_len: int) -> list[dict[str, Any]]:
    """Of each group the first text's columns, and those of the others as its candidates; a single text is its own."""
    sides = [_encoded(texts, tokenizer, max_len) for texts in zip(*dataset, strict=True)]
    return [{**own, "candidates": others or [own]} for own, *others in zip(*sides, strict=True)]


def _encoded(texts: Sequence[str], tokenizer: Any, max_len: int) -> list[dict[str, Any]]:
    encoded, names = tokenizer(list(texts), truncation=True, max_length=max_len), tokenizer.model_input_names
    return [{name: encoded[name][i] for name in names} for i in range(len(texts))]


def _require_dropout(model: Any) -> None:
    from finetune.techniques.losses import has_dropout

    if not has_dropout(model):
        raise UserError(
            "data.train: single texts are learned from two draws of dropout, and this model has none; set dropout=0.1, "
            "or name pairs"
        )


_USAGE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
vectors = model.encode(["A text.", "Another one."])
print(vectors.shape, float(model.similarity(vectors, vectors)[0, 1]))
"""
EMBEDDING = Family(
    prepare=prepare,
    read=read,
    usage=_USAGE,
    tag="sentence-similarity",
    options=frozenset({"embedding", "ranks"}),
)

TASKS: Mapping[str, Task] = {
    "embedding": Task(
        family=EMBEDDING,
        score="spearman",
        layouts=(_TRIPLE, _PAIR, *_SINGLES, *JUDGED),
        header=JUDGED[0],
    ),
    "retrieval": Task(family=EMBEDDING, score="ndcg@10", layouts=(_TRIPLE, _PAIR, *_SINGLES)),
}
