"""The rule splitter beside pysbd on the same paragraphs: `python benchmarks/sentences.py --books FILE [--mb 2]`.

Precision and recall of our boundaries inside paragraphs, pysbd's taken for right; and the speed of both. pysbd keeps a
quotation whole, whatever sentences it holds; we do not, since BERT's pairs want sentences. So the agreement is also
given without the boundaries that lie within double quotation marks. Rounds alternate; medians are printed and written.
"""

import argparse
import json
import os
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from data_prep.text.sentences import split_sentences

RESULTS = Path(__file__).parent / "results" / "sentences.json"
MOST_CHARACTERS = 10_000  # of a paragraph: a longer one costs pysbd its square


def paragraphs(path: Path, characters: int) -> list[str]:
    """Paragraphs from all over the file, about so many characters, white space made even."""
    data = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().decode()
    every = max(1, len(data) // characters)
    found = [part for line in data.splitlines() for part in re.split(r"\n\s*\n", json.loads(line)["text"])]
    even = [" ".join(part.split()) for part in found[::every]]
    return [part for part in even if 0 < len(part) <= MOST_CHARACTERS]


def boundaries(sentences: list[str]) -> set[int]:
    """Where sentences meet, counted in characters other than spaces."""
    ends, position = set(), 0
    for sentence in sentences:
        position += len(sentence.replace(" ", ""))
        ends.add(position)
    return ends - {position}


def quoted(text: str) -> set[int]:
    """The places, counted likewise, on both sides of which lies the same quotation."""
    inside, found = False, set()
    for position, character in enumerate(text.replace(" ", ""), 1):
        inside = inside != (character == '"') if character not in "“”" else character == "“"
        if inside:
            found.add(position)
    return {place for place in found if place + 1 in found}


def agreement(texts: list[str], ours: list[list[str]], theirs: list[list[str]]) -> dict[str, dict[str, float]]:
    counts: dict[str, Counter[str]] = {"all": Counter(), "outside quotations": Counter()}
    for text, mine, other in zip(texts, ours, theirs, strict=True):
        found, right, inside = boundaries(mine), boundaries(other), quoted(text)
        for name, left_out in (("all", set()), ("outside quotations", inside)):
            a, b = found - left_out, right - left_out
            counts[name] += Counter(both=len(a & b), ours=len(a), theirs=len(b))
    table = {}
    for name, count in counts.items():
        table[name] = {
            "boundaries": count["theirs"],
            "precision": count["both"] / count["ours"],
            "recall": count["both"] / count["theirs"],
            "f1": 2 * count["both"] / (count["ours"] + count["theirs"]),
        }
    return table


def timed(split: Callable[[str], list[str]], texts: list[str]) -> tuple[float, list[list[str]]]:
    started = time.process_time()
    found = [split(text) for text in texts]
    return time.process_time() - started, found


def rounds(
    count: int, texts: list[str], splitters: dict[str, Callable[[str], list[str]]]
) -> Iterator[tuple[str, float, list[list[str]]]]:
    for _ in range(count):
        for name, split in splitters.items():
            seconds, found = timed(split, texts)
            yield name, sum(map(len, texts)) / 1e6 / seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--books", type=Path, default=os.environ.get("CLOZE_BOOKS_SMALL"), help="jsonl.zst (or CLOZE_BOOKS_SMALL)"
    )
    parser.add_argument("--mb", type=float, default=2, help="million characters to split")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.books is None:
        print("sentences: name a corpus: --books FILE.jsonl.zst (or CLOZE_BOOKS_SMALL)")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pysbd
    segment = pysbd.Segmenter(language="en", clean=False).segment
    texts = paragraphs(options.books, int(options.mb * 1e6))
    speeds: dict[str, list[float]] = {"rules": [], "pysbd": []}
    sentences: dict[str, list[list[str]]] = {}
    for name, speed, found in rounds(options.rounds, texts, {"rules": split_sentences, "pysbd": segment}):
        speeds[name].append(speed)
        sentences[name] = found
    whole = [
        i for i, text in enumerate(texts) if "".join(sentences["pysbd"][i]).replace(" ", "") == text.replace(" ", "")
    ]
    table = agreement([texts[i] for i in whole], *([sentences[name][i] for i in whole] for name in ("rules", "pysbd")))
    result = {
        "file": options.books.name,
        "characters": sum(map(len, texts)),
        "paragraphs": len(texts),
        "paragraphs_pysbd_lost_text_of": len(texts) - len(whole),
        "agreement": table,
        "mb_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "rounds": options.rounds,
    }
    for name, row in table.items():
        print(f"{name:20} " + "  ".join(f"{key} {value:,.3f}" for key, value in row.items()))
    ours, theirs = result["mb_per_second"].values()
    print(f"{'MB/s of CPU':20} rules {ours:.1f}  pysbd {theirs:.2f}  ratio {ours / theirs:.0f}")
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
