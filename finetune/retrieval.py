"""Finding documents for queries: data in BEIR's layout (Thakur et al. 2021), search by vectors and by BM25, scores.

Shapes: Q queries, D documents, H width, K results of a query.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError, first_line

Floats = npt.NDArray[np.float32]

TOP = 100  # results of a query that are looked at
_BLOCK = 8192  # documents whose vectors are in memory at once
# Words, and ideographs and kana one by one: they are written without spaces.
_TERM = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+?(?=[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\b|_)"
)


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """Documents, queries, and which documents are right for each query, by how much."""

    name: str
    documents: Sequence[str]  # title and text
    queries: Sequence[str]
    relevance: Sequence[Mapping[int, float]]  # of each query: place of a document -> above 0


def read_beir(folder: Path) -> RetrievalSet:
    """A directory with corpus.jsonl, queries.jsonl and qrels/test.tsv. Queries without a judgement are left out.

    Raises `UserError` with file and line for what cannot be read.
    """
    places: dict[str, int] = {}
    documents: list[str] = []
    for where, row in _objects(folder / "corpus.jsonl"):
        text = " ".join(part for part in (str(row.get("title") or "").strip(), str(row["text"]).strip()) if part)
        if not text or row["_id"] in places:
            raise UserError(f"{where}: {'an empty document' if not text else 'an _id that was there before'}; mend it")
        places[str(row["_id"])] = len(documents)
        documents.append(text)
    texts = {str(row["_id"]): str(row["text"]).strip() for _, row in _objects(folder / "queries.jsonl")}
    found: dict[str, dict[int, float]] = {}
    for where, (query, document, score) in _judgements(folder / "qrels" / "test.tsv"):
        if query not in texts or document not in places:
            kind, name = ("query", query) if query not in texts else ("document", document)
            raise UserError(f"{where}: no {kind} has the _id {name}; is it of another set?")
        if not texts[query]:
            raise UserError(f"{folder / 'queries.jsonl'}: the query {query} is empty; mend it")
        if score > 0:
            found.setdefault(query, {})[places[document]] = score
    if not found:
        raise UserError(f"{folder / 'qrels' / 'test.tsv'}: holds no judgement above 0")
    return RetrievalSet(
        name=folder.name,
        documents=documents,
        queries=[texts[query] for query in found],
        relevance=list(found.values()),
    )


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); an object with _id and text is needed") from None
        if not isinstance(row, dict) or not {"_id", "text"} <= row.keys():
            there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{where}: _id and text are needed, there are {there}")
        yield where, row
    if not number:
        raise UserError(f"{path}: is empty")


def _judgements(path: Path) -> Iterator[tuple[str, tuple[str, str, float]]]:
    """Query, document, score: apart by tabs, under a header."""
    for number, line in enumerate(_lines(path), 1):
        cells = line.split("\t")
        try:
            query, document, score = cells[0], cells[1], float(cells[2])
        except (IndexError, ValueError):
            if number == 1 and len(cells) == 3:  # the header
                continue
            where = f"{path}: line {number}"
            raise UserError(
                f"{where}: {line[:60]!r}: query-id, corpus-id and score are needed, apart by tabs"
            ) from None
        yield f"{path}: line {number}", (query, document, score)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.rstrip("\r\n") for line in file if line.strip())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; BEIR's layout is corpus.jsonl, queries.jsonl, qrels/test.tsv") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); a UTF-8 text is needed") from None


def search(
    queries_QH: Floats, num_documents: int, vectors: Callable[[int, int], Floats], top: int = TOP
) -> npt.NDArray[np.int64]:
    """The documents of highest inner product, best first: i64 [Q, K].

    `vectors(start, stop)` are those of some documents; a block at a time, so that a corpus of any size fits.
    """
    scores_QK = np.empty((len(queries_QH), 0), np.float32)
    places_QK = np.empty((len(queries_QH), 0), np.int64)
    for start in range(0, num_documents, _BLOCK):
        block_BH = vectors(start, min(start + _BLOCK, num_documents))
        scores_QK = np.concatenate([scores_QK, queries_QH @ block_BH.T], axis=1)
        new_B = np.arange(start, start + len(block_BH), dtype=np.int64)
        places_QK = np.concatenate([places_QK, np.broadcast_to(new_B, (len(queries_QH), len(new_B)))], axis=1)
        order_QK = np.argsort(-scores_QK, axis=1, kind="stable")[:, :top]
        scores_QK = np.take_along_axis(scores_QK, order_QK, axis=1)
        places_QK = np.take_along_axis(places_QK, order_QK, axis=1)
    return places_QK


def search_bm25(data: RetrievalSet, top: int = TOP) -> npt.NDArray[np.int64]:
    """BM25 (Robertson et al. 1995) as bm25s has it, with its k1 = 1.5 and b = 0.75: i64 [Q, K].

    Raises `UserError` where the package is not there.
    """
    try:
        import bm25s
    except ModuleNotFoundError:
        raise UserError("bm25=true: needs bm25s: pip install 'cloze[retrieval]', or set bm25=false") from None
    index = bm25s.BM25()
    index.index([terms(text) for text in data.documents], show_progress=False)
    known = index.vocab_dict
    asked = [[term for term in terms(text) if term in known] for text in data.queries]
    count = min(top, len(data.documents))
    found_QK = np.tile(np.arange(count, dtype=np.int64), (len(asked), 1))  # a query of unknown words finds anything
    with_words = [place for place, query in enumerate(asked) if query]
    if with_words:
        results = index.retrieve([asked[place] for place in with_words], k=count, show_progress=False)
        found_QK[with_words] = results.documents
    return found_QK


def terms(text: str) -> list[str]:
    """Words in lower case, ideographs one by one. No stemming, and stop words stay: BM25 weighs them down."""
    return _TERM.findall(text.lower())


def ndcg(gains_QK: Floats, ideal: Sequence[Sequence[float]], cut: int) -> npt.NDArray[np.float64]:
    """Normalized discounted cumulative gain at `cut` (Järvelin and Kekäläinen 2002) of each query, f64 [Q].

    `gains_QK` are those of the results in order, `ideal` all that a query has. The gain is the judgement itself and the
    discount log2(1 + rank), as trec_eval and BEIR have it.
    """
    discounts_K = 1 / np.log2(np.arange(2, cut + 2))
    own_QK = gains_QK[:, :cut]
    found_Q = (own_QK * discounts_K[: own_QK.shape[1]]).sum(1)
    best_Q = [float(np.dot(sorted(one, reverse=True)[:cut], discounts_K[: min(cut, len(one))])) for one in ideal]
    return np.asarray(found_Q / np.asarray(best_Q), np.float64)


def recall(gains_QK: Floats, num_right_Q: Sequence[int], cut: int) -> npt.NDArray[np.float64]:
    """The share of a query's right documents among its first `cut` results, f64 [Q]."""
    return np.asarray((gains_QK[:, :cut] > 0).sum(1) / np.asarray(num_right_Q), np.float64)


def score(data: RetrievalSet, places_QK: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """nDCG@10, recall@1, @10 and @100 of each query."""
    gains_QK = np.asarray(
        [[right.get(int(place), 0.0) for place in row] for right, row in zip(data.relevance, places_QK, strict=True)],
        np.float32,
    )
    counts = [len(right) for right in data.relevance]
    found = {"ndcg@10": ndcg(gains_QK, [[*right.values()] for right in data.relevance], 10)}
    return found | {f"recall@{cut}": recall(gains_QK, counts, cut) for cut in (1, 10, 100)}
