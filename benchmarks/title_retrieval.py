"""Data for finding articles by their titles: `python benchmarks/title_retrieval.py wiki.jsonl.zst OUT`.

Of a file of JSON lines with `title` and `text`, every fourth article is for testing: OUT/titles has BEIR's layout, the
titles are the queries. The others are OUT/train.jsonl, pairs of a title and the beginning of its article, and
OUT/pretrain.jsonl, their whole texts. What was measured with them stands in docs/results.md.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec

_BEGINNING = 1000  # characters of an article that a pair has: about 200 words, more than the model reads


def articles(path: str) -> Iterator[dict[str, str]]:
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(path: str, out: Path, num_test: int, num_pretrain: int) -> None:
    """`num_test` articles to find among, and at most `num_pretrain` to pretrain on."""
    (out / "titles" / "qrels").mkdir(parents=True)
    judgements = ["query-id\tcorpus-id\tscore"]
    corpus: list[str] = []
    queries: list[str] = []
    pairs: list[str] = []
    texts: list[str] = []
    for number, article in enumerate(articles(path)):
        title, text = article["title"].strip(), article["text"].strip()
        if not title or not text:
            continue
        if number % 4:
            pairs.append(json.dumps({"anchor": title, "positive": text[:_BEGINNING]}, ensure_ascii=False))
            texts.append(json.dumps({"text": text}, ensure_ascii=False))
        elif len(corpus) < num_test:
            corpus.append(json.dumps({"_id": f"d{number}", "text": text}, ensure_ascii=False))
            queries.append(json.dumps({"_id": f"q{number}", "text": title}, ensure_ascii=False))
            judgements.append(f"q{number}\td{number}\t1")
    for name, lines in {
        "titles/corpus.jsonl": corpus,
        "titles/queries.jsonl": queries,
        "titles/qrels/test.tsv": judgements,
        "train.jsonl": pairs[200:],
        "dev.jsonl": pairs[:200],
        "pretrain.jsonl": texts[:num_pretrain],
    }.items():
        (out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out}: {len(corpus):,} articles to find, {len(pairs) - 200:,} pairs to learn from")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("articles", help="JSON lines with title and text, also compressed")
    parser.add_argument("out", type=Path, help="directory to write; must be new")
    parser.add_argument("--test", type=int, default=3000, help="articles to find among")
    parser.add_argument("--pretrain", type=int, default=3000, help="articles to pretrain on")
    options = parser.parse_args()
    write(options.articles, options.out, options.test, options.pretrain)
