"""Entry: `python -m finetune.embeddings model=out/vectors sts=[sts-test.csv] retrieval=[beir/scifact]`: are they good?

Similarity by Spearman, retrieval by nDCG@10 and recall, beside random weights of the same architecture and BM25. The
model may be what `task=embedding` wrote, a directory of sentence-transformers or any encoder. Tables are Markdown.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze import cli
from cloze.errors import ExitCode, UserError, first_line
from cloze.log import closing, log
from cloze.patience import telling
from finetune.config import EmbeddingsConfig
from finetune.data import Dataset
from finetune.families.embedding import JUDGED, judged
from finetune.readers import suffix, table_rows
from finetune.retrieval import RetrievalSet, Search, read_beir, score, search_bm25
from pretrain.evaluate import confidence
from pretrain.evaluate.confidence import Interval
from pretrain.export.card import table

if TYPE_CHECKING:  # torch takes seconds, and --help none of them
    from pretrain.evaluate.frozen_config import Pooling
    from pretrain.evaluate.states import Encoder

Floats = npt.NDArray[np.float32]

_MAX_BAD_FRACTION = 0.01  # of the rows of an STS file
_BLOCK = 8192  # documents whose tokens and vectors are in memory at once


class Row(NamedTuple):
    """One line of a table: what was looked at, and each score in percent, of random weights the mean and deviation."""

    name: str
    scores: Sequence[Interval | tuple[float, float]]


def run(config: EmbeddingsConfig) -> int:
    """Print the tables."""
    try:
        from finetune.embedder import load_embedder
        from pretrain.evaluate.states import random_encoder
    except ModuleNotFoundError as error:
        raise UserError(f"finetune.embeddings needs {error.name}: pip install 'cloze[finetune]'") from None
    pairs = {path: read_judged(path) for path in config.sts or ()}  # first: a fault of a file shows at once
    sets = [read_beir(Path(folder)) for folder in config.retrieval or ()]
    encoder, pooling = load_embedder(Path(config.model), config.max_len, config.pooling)
    random = [random_encoder(encoder, config.seed + number) for number in range(config.random_seeds)]
    models = _Models((encoder, *random), pooling)
    for path, (texts, scores) in pairs.items():
        name = f"{Path(path).name}, {len(texts):,} pairs"
        with telling(name):
            print(_table(name, ["Spearman"], _similarity(texts, scores, models, config.seed)))
    for data in sets:
        name = f"{data.name}, {len(data.documents):,} documents, {len(data.queries):,} queries"
        names = ["ndcg@10", "recall@1", "recall@10", "recall@100"]
        with telling(name):
            print(_table(name, names, _retrieval(data, models, config)))
    closing(f"model={config.model}: scored; nothing is saved")
    return ExitCode.OK


class _Models(NamedTuple):
    """The one that is looked at, then random weights; all have its tokenizer."""

    encoders: "Sequence[Encoder]"
    pooling: "Pooling"

    def vectors(self, texts: Sequence[str], name: str) -> list[Floats]:
        """Of each model, [N, H]; the texts are cut into tokens once."""
        from pretrain.evaluate.states import encode, text_vectors

        encoded = encode(self.encoders[0], texts, name)
        found = [text_vectors(encoder, encoded, self.pooling) for encoder in self.encoders]
        _check(found[0], name)
        return found


def _check(vectors_NH: Floats, name: str) -> None:
    """Warn of vectors of length 0. Raises `UserError` where some are no numbers."""
    if not np.isfinite(vectors_NH).all():
        raise UserError(f"{name}: vectors of the model are not finite; its training diverged, or its file is damaged")
    if num_zero := int((~vectors_NH.any(axis=1)).sum()):
        log.warning(f"{name}: {num_zero} of {len(vectors_NH)} vectors have length 0: they are like no other")


def read_judged(path: str) -> tuple[list[tuple[str, ...]], list[float]]:
    """Pairs of texts, and how similar people find them. Raises `UserError` for what cannot be read."""
    name = f"sts={path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read ({first_line(error)}); a UTF-8 text is needed") from None
    rows = table_rows(text, JUDGED[0], JUDGED, quoted=suffix(path) == ".csv")
    if not rows:
        raise UserError(f"{name}: holds no pairs")
    return judged(Dataset(name=name, rows=rows, max_bad_fraction=_MAX_BAD_FRACTION))


def _similarity(pairs: Sequence[tuple[str, ...]], scores: Sequence[float], models: _Models, seed: int) -> list[Row]:
    judged_N = np.asarray(scores, np.float64)
    drawn_BxN = confidence.draw_examples(len(pairs), seed)
    found: list[list[npt.NDArray[np.float64]]] = []
    sides = [models.vectors([pair[side] for pair in pairs], "sts") for side in (0, 1)]
    for first_NH, second_NH in zip(*sides, strict=True):
        cosines_N = (first_NH * second_NH).sum(1).astype(np.float64)
        drawn = drawn_BxN if not found else drawn_BxN[:1]
        found.append([100 * confidence.spearman(judged_N, cosines_N, drawn)])
    return _rows(found)


def _retrieval(data: RetrievalSet, models: _Models, config: EmbeddingsConfig) -> list[Row]:
    drawn_BxQ = confidence.draw_examples(len(data.queries), config.seed)
    searches = [Search(queries_QH) for queries_QH in models.vectors(data.queries, f"{data.name}: queries")]
    for start in range(0, len(data.documents), _BLOCK):
        name = f"{data.name}: documents from {start:,}"
        block = models.vectors(data.documents[start : start + _BLOCK], name)
        for search, documents_BH in zip(searches, block, strict=True):
            search.add(documents_BH)
    by_query = [score(data, search.places_QK) for search in searches]
    rows = _rows([[100 * values_Q[drawn_BxQ].mean(1) for values_Q in one.values()] for one in by_query])
    if config.bm25:
        found = score(data, search_bm25(data))
        rows.append(Row("BM25", [confidence.interval(100 * q[drawn_BxQ].mean(1)) for q in found.values()]))
    return rows


def _rows(found: Sequence[Sequence[npt.NDArray[np.float64]]]) -> list[Row]:
    """Of each model and each score the values of the draws; the first model is the one that is looked at."""
    own, *random = found
    rows = [Row("this model", [confidence.interval(values_B) for values_B in own])]
    if random:
        each = [[float(values_B[0]) for values_B in values] for values in zip(*random, strict=True)]
        spread = [float(np.std(one, ddof=1)) if len(one) > 1 else 0.0 for one in each]
        rows.append(Row("random weights", [(float(np.mean(one)), std) for one, std in zip(each, spread, strict=True)]))
    return rows


def _table(name: str, scores: Sequence[str], rows: Sequence[Row]) -> str:
    return table([name, *(f"{one}, %" for one in scores)], [[row.name, *map(_cell, row.scores)] for row in rows])


def _cell(found: Interval | tuple[float, float]) -> str:
    if isinstance(found, Interval):
        return f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f})"
    return f"{found[0]:.1f} ± {found[1]:.1f}"


main = cli.hydra_command("embeddings", EmbeddingsConfig, positional=("model",))(run)

if __name__ == "__main__":
    sys.exit(main())
