"""`finetune.predict` on a large file, beside transformers' pipeline: `python benchmarks/predict.py [--lines 1000000]`.

The classifier is BERT-tiny with a vocabulary of 8,192 words and random weights; the lines repeat a few thousand
sentences with changed words. A process of its own labels the whole file: its peak memory and lines a second. Then both
label the same sample in turns, models already loaded: medians, the ratio, and how often the labels are the same. The
pipeline is asked in batches of several sizes, and its best one counts. Beside the clock stands the time of the CPU: it
means something where the machine does other things, too.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from finetune import predict

RESULTS = Path(__file__).parent / "results" / "predict.json"
BATCH_SIZES = (1, 16, 64, 256)  # the pipeline's


def vocabulary(rng: random.Random, size: int = 8192) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    fixed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), ",", "."]
    words = dict.fromkeys(fixed)
    while len(words) < size:
        word = "".join(rng.choices(letters, k=rng.randint(2, 9)))
        words[word if rng.random() < 0.8 else f"##{word}"] = None
    return [*words]


def write_model(folder: Path, words: list[str]) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    config = BertConfig(vocab_size=len(words), num_labels=4, initializer_range=0.2, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)


def lines(rng: random.Random, words: list[str], count: int) -> Iterator[str]:
    """Sentences of 3 to 15 words; each line changes two, of which one is seldom in the vocabulary as a whole."""
    known = [word for word in words if word.isalpha()]
    endings = [word[2:] for word in words if word.startswith("##")]
    sentences = [rng.choices(known, k=rng.randint(3, 15)) for _ in range(4000)]
    for _ in range(count):
        own = [*rng.choice(sentences)]
        own[rng.randrange(len(own))] = rng.choice(known)
        own[rng.randrange(len(own))] = rng.choice(known) + rng.choice(endings)
        yield f"{' '.join(own)}."


def whole(folder: Path, num_lines: int) -> dict[str, Any]:
    """A process of its own over the whole file, its start included."""
    command = [sys.executable, "-m", "finetune.predict", folder / "model", folder / "in.txt", folder / "out.tsv"]
    started = time.monotonic()
    child = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    seconds = time.monotonic() - started
    with (folder / "out.tsv").open() as file:
        assert sum(1 for _ in file) == num_lines + 1
    return {
        "lines": num_lines,
        "megabytes_in": (folder / "in.txt").stat().st_size / 1e6,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "lines_per_second": num_lines / seconds,
        "peak_rss_mb": usage.ru_maxrss / 1024,
    }


def beside_pipeline(folder: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """Lines a second of each on a sample, in turns. Ours reads and writes files, and loads its model each time."""
    from transformers import pipeline

    (folder / "sample.txt").write_text("\n".join(texts) + "\n")
    model, read, out = folder / "model", folder / "sample.txt", folder / "sample.out.jsonl"
    theirs = pipeline("text-classification", str(model), device="cpu")
    labels: dict[str, list[str]] = {}

    def ours() -> list[str]:
        out.unlink(missing_ok=True)
        assert predict.main([str(model), str(read), str(out), "--quiet"]) == 0
        return [json.loads(line)["prediction"] for line in out.read_text().splitlines()]

    def of_pipeline(size: int) -> list[str]:
        found = theirs(iter(texts), truncation=True, max_length=512, batch_size=size)
        return [one["label"] for one in found]

    ways: dict[str, Callable[[], list[str]]] = {"predict": ours}
    ways |= {f"pipeline, batches of {size}": partial(of_pipeline, size) for size in BATCH_SIZES}
    clock: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, label in ways.items():
            started = time.monotonic(), time.process_time()
            labels[name] = label()
            clock[name].append(time.monotonic() - started[0])
            cpu[name].append(time.process_time() - started[1])
    result: dict[str, Any] = {"lines": len(texts), "rounds": rounds}
    for kind, seconds in (("lines_per_second", clock), ("lines_per_cpu_second", cpu)):
        speeds = {name: len(texts) / statistics.median(own) for name, own in seconds.items()}
        best = max(speed for name, speed in speeds.items() if name != "predict")
        result |= {kind: speeds, f"ratio_{kind}": speeds["predict"] / best}
    others = labels[f"pipeline, batches of {BATCH_SIZES[0]}"]
    result["same_label"] = statistics.fmean(a == b for a, b in zip(labels["predict"], others, strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lines", type=int, default=200_000, help="of the whole file")
    parser.add_argument("--sample", type=int, default=4000, help="lines that both label")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = random.Random(0)
    words = vocabulary(rng)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", words)
        with (folder / "in.txt").open("w") as file:
            file.writelines(f"{line}\n" for line in lines(rng, words, options.lines))
        result: dict[str, dict[str, Any]] = {"whole": whole(folder, options.lines)}
        with (folder / "in.txt").open() as file:
            texts = [next(file).rstrip("\n") for _ in range(options.sample)]
        result["beside_pipeline"] = beside_pipeline(folder, texts, options.rounds)
    own = result["whole"]
    print(
        f"{own['lines']:,} lines ({own['megabytes_in']:.0f} MB) in {own['seconds']:.0f} s: "
        f"{own['lines_per_second']:,.0f} a second, {own['lines'] / own['cpu_seconds']:,.0f} a second of the "
        f"CPU, peak memory {own['peak_rss_mb']:,.0f} MB"
    )
    beside = result["beside_pipeline"]
    for name, speed in beside["lines_per_second"].items():
        print(
            f"{name:28} {speed:8,.0f} lines a second {beside['lines_per_cpu_second'][name]:8,.0f} a second of the CPU"
        )
    print(
        f"ratio to the pipeline's best {beside['ratio_lines_per_second']:.2f}, of the CPU's time "
        f"{beside['ratio_lines_per_cpu_second']:.2f}; same label {beside['same_label']:.2%}"
    )
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
