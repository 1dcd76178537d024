"""Minimal pairs beside minicons: `python benchmarks/minimal_pairs.py --blimp BLiMP.zip --books books-small.jsonl.zst`.

BERT-mini with random weights (large ones, so that scores differ) and a vocabulary trained on the books, fp32.
200 pairs from all paradigms: scores of both metrics must agree within 1e-3, and both sides are timed in turns, by the
CPU seconds of the process (others use the machine too); minicons at each of several batch sizes, its best counts. Then
BLiMP with 100 pairs a paradigm by ours, both metrics. Needs minicons, which no extra of Cloze brings: without it, ours
alone.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForPreTraining

from data_prep.__main__ import main as prepare
from pretrain.config import Attention
from pretrain.evaluate.minimal_pairs import encode_pairs
from pretrain.evaluate.pair_files import read_paradigms
from pretrain.evaluate.pll import UNIT, Metric, Scorer
from pretrain.export.hugging_face import be_quiet, load_packed
from pretrain.precision import cpu_name

RESULTS = Path(__file__).parent / "results" / "minimal_pairs.json"
PAIRS = 200
ROW_TOKENS = 4_096
BATCHES = 1, 8, 32  # sentences
TOLERANCE, RATIO_BAR, SECONDS_BAR = 1e-3, 5.0, 180.0


def random_mini(folder: Path, books: Path, vocabulary: int) -> Path:
    """BERT-mini with a tokenizer of its own."""
    overrides = ["source=jsonl", f"source.paths=[{books}]", f"out={folder}/corpus"]
    assert prepare([*overrides, f"tokenizer.vocab_size={vocabulary}"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "corpus" / "tokenizer")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    model = BertForPreTraining(BertConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes))
    model.save_pretrained(folder / "mini")
    tokenizer.save_pretrained(folder / "mini")
    return folder / "mini"


def minicons_scores(folder: Path) -> Callable[[list[str], Metric, int], list[float]] | None:
    """(sentences, metric, batch size) -> scores; None without minicons."""
    try:
        from minicons.scorer import MaskedLMScorer
    except ModuleNotFoundError:
        return None
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.batch_encode_plus = tokenizer.__call__  # it is gone from transformers 5, and minicons calls it
    scorer = MaskedLMScorer(AutoModelForMaskedLM.from_pretrained(folder), "cpu", tokenizer=tokenizer)

    def scores(sentences: list[str], metric: Metric, batch: int) -> list[float]:
        found: list[float] = []
        for start in range(0, len(sentences), batch):
            part = sentences[start : start + batch]
            found += scorer.sequence_score(part, reduction=lambda each: each.sum().item(), PLL_metric=metric.value)
        return found

    return scores


def timed(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU seconds, seconds, result)."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blimp", default=os.environ.get("CLOZE_BLIMP"), help="BLiMP.zip (or CLOZE_BLIMP)")
    parser.add_argument("--books", default=os.environ.get("CLOZE_BOOKS_SMALL"), help="jsonl.zst (or CLOZE_BOOKS_SMALL)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="30,522 is that of the published BERT-mini")
    parser.add_argument("--sampled", type=int, default=100, help="pairs of a paradigm that are scored in the end")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not (options.blimp and options.books):
        print(
            "minimal pairs: name the data: --blimp BLiMP.zip --books FILE.jsonl.zst (or CLOZE_BLIMP, CLOZE_BOOKS_SMALL)"
        )
        return
    be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        model = random_mini(Path(folder), Path(options.books).resolve(), options.vocabulary)
        result = measure(model, options.blimp, options.rounds, options.sampled)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**kept, f"vocabulary {options.vocabulary}": result}, indent=2) + "\n")


def measure(model: Path, blimp: str, rounds: int, sampled_pairs: int) -> dict[str, Any]:
    module, tokenizer = load_packed(model, Attention.sdpa)
    scorer = Scorer(
        logits_of=lambda batch: module(batch)[0],
        mask_id=tokenizer.mask_token_id,
        max_positions=module.max_positions,
        row_tokens=ROW_TOKENS,
        device=torch.device("cpu"),
    )
    paradigms = read_paradigms([blimp], most=-(-PAIRS // 67))
    pairs = encode_pairs(paradigms, tokenizer.backend_tokenizer, scorer.max_positions)
    encoded = pairs.encoded[:PAIRS]
    plain = [pair for paradigm in paradigms for pair in paradigm.pairs][:PAIRS]
    sentences = [sentence for pair in plain for sentence in (pair.good, pair.bad)]
    threads = torch.get_num_threads()
    result: dict[str, Any] = {"cpu": cpu_name(), "pairs": len(encoded), "threads": threads, "rounds": rounds}
    theirs = minicons_scores(model)
    if theirs:
        ours = scorer.score(encoded, list(Metric)) * UNIT
        for number, metric in enumerate(Metric):
            difference = float(np.abs(ours[:, number] - theirs(sentences, metric, BATCHES[1])).max())
            result[f"largest_difference_{metric.value}"] = difference
            print(
                f"{metric.value:16} largest difference of {len(sentences)} scores {difference:.1e} (bar {TOLERANCE:g})"
            )
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            taken = timed(lambda: scorer.score(encoded, [Metric.within_word_l2r]))
            seconds.setdefault("cloze", []).append(taken[0])
            for batch in BATCHES:
                taken = timed(lambda batch=batch: theirs(sentences, Metric.within_word_l2r, batch))
                seconds.setdefault(f"minicons, batches of {batch}", []).append(taken[0])
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in medians.items():
            print(f"{name:24} {value:6.2f} CPU seconds for {len(encoded)} pairs")
        ratio = min(value for name, value in medians.items() if name != "cloze") / medians["cloze"]
        print(f"ratio {ratio:.1f} (bar {RATIO_BAR:g})")
        result |= {"cpu_seconds": medians, "ratio": ratio}
    else:
        print("minicons is not installed: ours alone")
    sampled = encode_pairs(
        read_paradigms([blimp], most=sampled_pairs), tokenizer.backend_tokenizer, scorer.max_positions
    )
    cpu, wall, _ = timed(lambda: scorer.score(sampled.encoded, list(Metric)))
    result["sampled"] = {"pairs": len(sampled.encoded), "cpu_seconds": cpu, "seconds": wall}
    print(f"{len(sampled.encoded):,} pairs, both metrics: {wall:.0f} s, {cpu:.0f} CPU seconds (bar {SECONDS_BAR:g} s)")
    return result


if __name__ == "__main__":
    main()
