"""Preparation beside its peers, on the same text: `python benchmarks/prep.py --books-small FILE [--books FILE]`.

Ours is the whole command, text to finished shards, start-up included. Peers: `tokenizers.encode_batch` alone on the
same sentences; `datasets.map` (tokenize, then group into full samples); and a straightforward Python port of BERT's
create_pretraining_data, on a share of the text. Each peer runs in a process of its own and counts the CPU seconds of
its work alone, all with the same tokenizer. Rounds alternate; medians are printed and written as JSON.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import zstandard

from data_prep.manifest import read_manifest
from data_prep.sentences import split_sentences
from data_prep.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "prep.json"
PORT_SHARE = 20  # the Python port runs on one document of so many
PEERS = ("encode_batch", "datasets_map", "python_port")


def texts(path: Path) -> list[str]:
    data = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
    return [json.loads(line)["text"] for line in data.decode().splitlines()]


# -- peers: each runs in a process of its own, and prints its CPU seconds and its MB ---------------------------------


def encode_batch(documents: list[str], tokenizer: Path) -> None:
    backend = load_tokenizer(tokenizer).backend
    sentences = [sentence for text in documents for sentence in split_sentences(text)]
    started = time.process_time()
    for start in range(0, len(sentences), 1000):
        backend.encode_batch(sentences[start : start + 1000], add_special_tokens=False)
    print(time.process_time() - started, sum(map(len, documents)) / 1e6)


def datasets_map(documents: list[str], tokenizer: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    fast = AutoTokenizer.from_pretrained(tokenizer)

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: [value for row in column for value in row] for key, column in rows.items()}
        total = len(joined["input_ids"]) // 128 * 128
        return {key: [values[i : i + 128] for i in range(0, total, 128)] for key, values in joined.items()}

    with tempfile.TemporaryDirectory() as folder:
        table = datasets.Dataset.from_dict({"text": documents})
        started = time.process_time()
        table = table.map(
            lambda rows: fast(rows["text"], return_special_tokens_mask=True, verbose=False),
            batched=True, remove_columns=["text"], cache_file_name=f"{folder}/a.arrow",
        )  # fmt: skip
        table.map(group, batched=True, cache_file_name=f"{folder}/b.arrow")
        print(time.process_time() - started, sum(map(len, documents)) / 1e6)


def python_port(documents: list[str], tokenizer: Path) -> None:
    """BERT's way, sentence by sentence and token by token, as its paper and appendix tell it."""
    backend = load_tokenizer(tokenizer).backend
    started, rng, room = time.process_time(), random.Random(1), 125
    encoded = [
        [backend.encode(s, add_special_tokens=False).tokens for s in split_sentences(text)] for text in documents
    ]
    words = list(backend.get_vocab())
    written = 0
    for document in encoded:
        chunk: list[list[str]] = []
        i = 0
        while i < len(document):
            chunk.append(document[i])
            if i == len(document) - 1 or sum(map(len, chunk)) >= room:
                cut = rng.randint(1, max(1, len(chunk) - 1))
                a = [token for sentence in chunk[:cut] for token in sentence]
                b: list[str] = []
                if len(chunk) == 1 or rng.random() < 0.5:
                    other = rng.choice(encoded)
                    for sentence in other[rng.randrange(len(other)) :]:
                        b += sentence
                        if len(a) + len(b) >= room:
                            break
                    i -= len(chunk) - cut
                else:
                    b = [token for sentence in chunk[cut:] for token in sentence]
                while len(a) + len(b) > room:
                    longer = a if len(a) > len(b) else b
                    longer.pop(0 if rng.random() < 0.5 else -1)
                sample = ["[CLS]", *a, "[SEP]", *b, "[SEP]"]
                places = [p for p, token in enumerate(sample) if token not in ("[CLS]", "[SEP]")]
                rng.shuffle(places)
                for place in sorted(places[: min(20, max(1, round(len(sample) * 0.15)))]):
                    dice = rng.random()
                    sample[place] = "[MASK]" if dice < 0.8 else sample[place] if dice < 0.9 else rng.choice(words)
                ids = [backend.token_to_id(token) for token in sample]
                written += len(json.dumps({"ids": ids, "second": len(b)}))
                chunk = []
            i += 1
    assert written
    print(time.process_time() - started, sum(map(len, documents)) / 1e6)


# -- measuring --------------------------------------------------------------------------------------------------------


def peer(name: str, path: Path, tokenizer: Path) -> float:
    """MB per CPU second."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--peer", name, "--books-small", str(path), "--tokenizer", str(tokenizer)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, run.stdout.split()[-2:])
    return megabytes / seconds


def ours(path: Path, out: Path, tokenizer: Path, workers: int, *extra: str) -> dict[str, float]:
    """The command: CPU and wall seconds, and the peak memory of its process tree."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "data_prep", "source=jsonl", f"source.paths=[{path}]", f"out={out}",
        f"tokenizer.path={tokenizer}", f"engine.workers={workers}", *extra,
    ]  # fmt: skip
    started, before = time.perf_counter(), os.times()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                peak = max(peak, sum(each.memory_info().rss for each in tree))
            except psutil.Error:
                pass
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    after = os.times()
    assert code == 0, command
    manifest = read_manifest(out)
    tokens = sum(split.tokens for split in manifest.splits.values())
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "cpu_seconds": cpu,
        "wall_seconds": time.perf_counter() - started,
        "peak_mb": peak / 1e6,
        "megabytes": manifest.documents["bytes"] / 1e6,
        "mb_per_cpu_second": manifest.documents["bytes"] / 1e6 / cpu,
        "disk_ratio": sum(shard.bytes for shard in manifest.shards) / (2 * tokens),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    tokenizer = folder / "train" / "tokenizer"
    train = ["source=jsonl", f"source.paths=[{options.books_small}]", f"out={folder / 'train'}", "engine.workers=2"]
    subprocess.run([sys.executable, "-m", "data_prep", *train], cwd=ROOT, check=True, capture_output=True)
    names = [name for name in PEERS if name not in options.skip]
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds):
        one = ours(options.books_small, folder / "one", tokenizer, 1)
        row = {"ours": one["mb_per_cpu_second"], "peak_mb": one["peak_mb"], "disk_ratio": one["disk_ratio"]}
        row |= {name: peer(name, options.books_small, tokenizer) for name in names}
        two = ours(options.books_small, folder / "two", tokenizer, 2)
        row["two_workers"] = one["wall_seconds"] / two["wall_seconds"]
        rounds.append(row)
    small = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    ratios = {f"ours / {name}": statistics.median(row["ours"] / row[name] for row in rounds) for name in names}
    bare = ours(options.books_small, folder / "bare", tokenizer, 1, "masking.baked_draws=0")["disk_ratio"]
    result: dict[str, object] = {"books_small": small, "ratios": ratios, "disk_ratio_without_masks": bare}
    if options.books:
        large = ours(options.books, folder / "large", tokenizer, 1)
        large_two = ours(options.books, folder / "large2", tokenizer, 2)
        result["books"] = large
        result["books_ratio_to_encode_batch"] = large["mb_per_cpu_second"] / small["encode_batch"]
        result["books_two_workers"] = large["wall_seconds"] / large_two["wall_seconds"]
        result["memory_150_to_12_mb"] = large["peak_mb"] / small["peak_mb"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--books-small", type=Path, default=os.environ.get("CLOZE_BOOKS_SMALL"), help="jsonl.zst, 12 MB"
    )
    parser.add_argument("--books", type=Path, help="jsonl.zst, 150 MB: speed and memory at size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=PEERS)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.books_small is None:
        print("prep: name a corpus: --books-small FILE.jsonl.zst (or CLOZE_BOOKS_SMALL)")
        return
    if options.peer:
        documents = texts(options.books_small)
        documents = documents[::PORT_SHARE] if options.peer == "python_port" else documents
        globals()[options.peer](documents, options.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    for key, value in result.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{key + ' ' + name:44} {number:10.3f}")
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
