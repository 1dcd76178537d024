"""Preparation beside its peers: `python benchmarks/prep.py --books-small FILE [--books FILE] [--script NAME=FILE]…`.

Ours is the whole command with one worker, text to finished shards. Peers, each in a process of its own with the same
tokenizer: `tokenizers.encode_batch` alone on the same sentences; `datasets.map` (tokenize, then group into full
samples); and BERT's algorithm in plain Python (bert_port.py), whose ids are checked against ours.

Speed is MB of text per CPU second, user and system. `whole` counts a process from its start to its end, `work` leaves
out the start: for a peer what precedes its first document, for ours the whole command on a single document. Memory is
the proportional set size of the process tree, in which a page that n processes share counts 1/n in each. Beside two
workers stand two commands of one worker each at once: what this machine's cores give. Rounds alternate; medians of the
rounds' ratios are printed, and written as JSON.

A text in another script (`--script thai=thai.txt`) has a tokenizer of 8,192 tokens trained on it, and stands beside
`encode_batch` with that one, whose ids are compared first. A small text is made larger: documents of fifty sentences
drawn at random from it. Japanese is made of words that stand below.

`--kinds` measures the encoders alone instead, of each kind of tokenizer, trained on the small file: 8 MB of it, from
nothing remembered, beside `encode_batch` on the same sentences; ids are compared. `words` finds where words begin, too.
"""

import argparse
import contextlib
import ctypes
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zstandard
from bert_port import write_samples

from cloze.corpus.manifest import read_manifest
from cloze.corpus.tokenizer import load_tokenizer
from data_prep.text.encoder import Encoder
from data_prep.text.sentences import split_sentences
from data_prep.text.words import word_encoder
from pretrain.precision import cpu_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "prep.json"
SHARES = {"encode_batch": 1, "datasets_map": 1, "bert_port": 20}  # of the small file: one document of so many
PR_SET_CHILD_SUBREAPER = 36
BOOKS_SHARE = 5  # of the documents of the large file, for encode_batch
SCRIPT_BYTES = 8_000_000  # to which a small text in another script is made larger
SCRIPT_SHARE = 4  # of its documents, for encode_batch
JAPANESE = (  # one of each makes a sentence
    "昨日、 毎朝、 春になると、 雨の日には、 二〇二四年の夏、 子どものころ、 いつも 夜遅くまで",
    "私は 彼女が 先生は 学生たちは 黒い猫が この町の人々は 東京の会社が 友だちの祖父は 若い作家が アメリカの記者は",
    "駅前の喫茶店で 山の上で 大きな図書館で 海の近くの村で 電車の中で インターネットで 古いホテルで 公園のベンチで",
    "古い本を 新しいコンピュータを 朝ごはんを 長い手紙を 静かな音楽を 日本語の辞書を 家族の写真を 小さな約束を 地図を",
    "読んでいた。 買いました。 探している。 友人に見せた。 思い出すことができなかった。 どこかに置いた。 待っていた。",
)
Row = dict[str, float]


def texts(path: Path) -> list[str]:
    data = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
    return [json.loads(line)["text"] for line in data.splitlines()]


def enlarged(sentences: Sequence[str]) -> Iterator[str]:
    """Documents of fifty sentences drawn at random, `SCRIPT_BYTES` in all."""
    rng, size = random.Random(0), 0
    while size < SCRIPT_BYTES:
        yield (document := "\n\n".join(rng.choices(sentences, k=50)))
        size += len(document.encode())


def japanese() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice(words.split()) for words in JAPANESE) for _ in range(20_000)]


def script_text(name: str, path: Path | None, folder: Path) -> Path:
    """The text in another script as JSON Lines."""
    if path is not None and path.suffix == ".zst":
        return path
    text = "\n\n".join(japanese()) if path is None else path.read_text(errors="replace").replace("\n", "\n\n")
    made = folder / f"{name}.jsonl.zst"
    lines = "".join(json.dumps({"text": document}) + "\n" for document in enlarged(split_sentences(text)))
    made.write_bytes(zstandard.compress(lines.encode()))
    return made


# -- peers: each runs in a process of its own, and prints the CPU seconds of its work and its MB ----------------------


def encode_batch(documents: Sequence[str], tokenizer: Path) -> float:
    backend = load_tokenizer(tokenizer).backend
    sentences = [sentence for text in documents for sentence in split_sentences(text)]
    started = time.process_time()
    for start in range(0, len(sentences), 1000):
        backend.encode_batch(sentences[start : start + 1000], add_special_tokens=False)
    return time.process_time() - started


def datasets_map(documents: Sequence[str], tokenizer: Path) -> float:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    fast = AutoTokenizer.from_pretrained(tokenizer)

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: [value for row in column for value in row] for key, column in rows.items()}
        total = len(joined["input_ids"]) // 128 * 128
        return {key: [values[i : i + 128] for i in range(0, total, 128)] for key, values in joined.items()}

    with tempfile.TemporaryDirectory() as folder:
        table = datasets.Dataset.from_dict({"text": list(documents)})
        started = time.process_time()
        table = table.map(
            lambda rows: fast(rows["text"], return_special_tokens_mask=True, verbose=False),
            batched=True, remove_columns=["text"], cache_file_name=f"{folder}/a.arrow",
        )  # fmt: skip
        table.map(group, batched=True, cache_file_name=f"{folder}/b.arrow")
        return time.process_time() - started


def bert_port(documents: Sequence[str], tokenizer: Path) -> float:
    backend = load_tokenizer(tokenizer).backend
    vocabulary = dict(sorted(backend.get_vocab().items()))
    with tempfile.TemporaryFile("w") as file:
        started = time.process_time()
        sentences = [split_sentences(text) for text in documents]
        tokens = write_samples(sentences, vocabulary, file)
        seconds = time.process_time() - started
        assert file.tell() > 0
    ids = [vocabulary[token] for document in tokens for sentence in document for token in sentence]
    flat = [sentence for document in sentences for sentence in document]
    assert ids == Encoder(backend).encode(flat)[0].tolist(), "the port and we disagree about ids"
    return seconds


PEERS: dict[str, Callable[[Sequence[str], Path], float]] = {
    "encode_batch": encode_batch,
    "datasets_map": datasets_map,
    "bert_port": bert_port,
}


# -- measuring --------------------------------------------------------------------------------------------------------


def reap() -> None:
    """Wait for workers, and what started them, of commands that have ended: they are ours since then."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def measured(command: Sequence[str], environment: dict[str, str], watched: bool = True) -> tuple[Row, str]:
    """Run a command: CPU and wall seconds and the peak memory of its process tree, and what it printed.

    To watch the memory takes time of a core, which is not to spare where every core has a worker. Modules are compiled
    once and kept, as they are unless an environment forbids it.
    """
    reap()
    environment = {name: value for name, value in environment.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started, before = time.perf_counter(), os.times()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.DEVNULL)
        peak = 0

        def watch() -> None:
            nonlocal peak
            while watched and process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    peak = max(peak, sum(each.memory_full_info().pss for each in tree))
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        wall = time.perf_counter() - started
        watcher.join()
        reap()
        assert code == 0, command
        output.seek(0)
        printed = output.read()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu_seconds": cpu, "wall_seconds": wall, "peak_mb": peak / 1e6}, printed


def peer(name: str, path: Path, tokenizer: Path, share: int) -> tuple[float, float]:
    """MB per CPU second: of its work, and of its whole process."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    options = ["--books-small", str(path), "--tokenizer", str(tokenizer), "--share", str(share)]
    row, printed = measured([sys.executable, __file__, "--peer", name, *options], environment)
    seconds, megabytes = map(float, printed.split()[-2:])
    return megabytes / seconds, megabytes / row["cpu_seconds"]


def ours(path: Path, out: Path, tokenizer: Path | None, workers: int, *extra: str, watched: bool = True) -> Row:
    """The whole command; without a tokenizer it trains one of 30,522 tokens."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "data_prep", "source=jsonl", f"source.paths=[{path}]", f"out={out}",
        f"tokenizer.path={tokenizer or 'null'}", f"executor.workers={workers}", *extra,
    ]  # fmt: skip
    row, _ = measured(command, dict(os.environ), watched)
    manifest = read_manifest(out)
    tokens = sum(split.tokens for split in manifest.splits.values())
    megabytes = manifest.documents["bytes"] / 1e6
    disk = sum(shard.bytes for shard in manifest.shards) / (2 * tokens)
    return row | {"megabytes": megabytes, "mb_per_cpu_second": megabytes / row["cpu_seconds"], "disk_ratio": disk}


def small_round(path: Path, single: Path, folder: Path, tokenizer: Path, names: Sequence[str]) -> Row:
    one = ours(path, folder / "out", tokenizer, 1)
    start = ours(single, folder / "out", tokenizer, 1)
    work = (one["megabytes"] - start["megabytes"]) / (one["cpu_seconds"] - start["cpu_seconds"])
    row = {"ours": one["mb_per_cpu_second"], "ours_work": work, "start_seconds": start["cpu_seconds"]}
    row |= {"peak_mb": one["peak_mb"], "disk_ratio": one["disk_ratio"]}
    row["ours, training a tokenizer"] = ours(path, folder / "out", None, 1)["mb_per_cpu_second"]
    for name in names:
        row[name], row[f"{name}_whole"] = peer(name, path, tokenizer, SHARES[name])
    if "encode_batch" in names:
        row["ours / encode_batch"] = one["mb_per_cpu_second"] / row["encode_batch"]
    if "datasets_map" in names:
        row["whole / datasets_map whole"] = one["mb_per_cpu_second"] / row["datasets_map_whole"]
        row["work / datasets_map work"] = work / row["datasets_map"]
    if "bert_port" in names:
        row["ours / bert_port"] = one["mb_per_cpu_second"] / row["bert_port"]
        row["whole / bert_port whole"] = one["mb_per_cpu_second"] / row["bert_port_whole"]
        row["work / bert_port work"] = work / row["bert_port"]
    return row


def books_round(path: Path, folder: Path, tokenizer: Path) -> Row:
    one = ours(path, folder / "out", tokenizer, 1)
    row = {f"one_worker {key}": value for key, value in one.items()}
    row["encode_batch"], _ = peer("encode_batch", path, tokenizer, BOOKS_SHARE)
    row["ours / encode_batch"] = one["mb_per_cpu_second"] / row["encode_batch"]
    row["bert_port"], _ = peer("bert_port", path, tokenizer, BOOKS_SHARE * 50)
    row["ours / bert_port"] = one["mb_per_cpu_second"] / row["bert_port"]
    two = ours(path, folder / "out", tokenizer, 2)
    row["two_workers peak_mb"] = two["peak_mb"]
    alone, both = (ours(path, folder / "out", tokenizer, workers, watched=False) for workers in (1, 2))
    row["one / two workers, wall"] = alone["wall_seconds"] / both["wall_seconds"]
    with ThreadPoolExecutor(2) as pool:  # one of them may reap the other: the walls are right, the CPU seconds not
        outs = [folder / "out", folder / "out-2"]
        commands = list(pool.map(lambda out: ours(path, out, tokenizer, 1, watched=False), outs))
    row["one / two commands at once, wall"] = 2 * alone["wall_seconds"] / max(row["wall_seconds"] for row in commands)
    row["two / one workers, cpu"] = two["cpu_seconds"] / one["cpu_seconds"]
    return row


def script_round(path: Path, single: Path, folder: Path, tokenizer: Path) -> Row:
    one, start = ours(path, folder / "out", tokenizer, 1), ours(single, folder / "out", tokenizer, 1)
    row = {"ours": one["mb_per_cpu_second"], "megabytes": one["megabytes"]}
    row["ours_work"] = (one["megabytes"] - start["megabytes"]) / (one["cpu_seconds"] - start["cpu_seconds"])
    row["encode_batch"], _ = peer("encode_batch", path, tokenizer, SCRIPT_SHARE)
    row["ours / encode_batch"] = row["ours"] / row["encode_batch"]
    return row | {"work / encode_batch": row["ours_work"] / row["encode_batch"]}


def scripts(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Row]]:
    """Texts in other scripts, one by one. Ours must give the ids of `encode_batch`, to the last one."""
    given = {name: Path(path) for name, _, path in (one.partition("=") for one in options.script)}
    for name, path in {**given, "japanese": None}.items():
        text, out = script_text(name, path, folder), folder / f"{name}-train"
        ours(text, out, None, 1, "tokenizer.vocab_size=8192", watched=False)
        backend, documents = load_tokenizer(out / "tokenizer").backend, texts(text)
        sentences = [sentence for document in documents[::SCRIPT_SHARE] for sentence in split_sentences(document)]
        expected = [i for encoding in backend.encode_batch(sentences, add_special_tokens=False) for i in encoding.ids]
        assert np.array_equal(Encoder(backend).encode(sentences)[0], expected), f"{name}: other ids than encode_batch's"
        single = folder / f"{name}-single.jsonl"
        single.write_text(json.dumps({"text": documents[0]}) + "\n")
        rounds = [script_round(text, single, folder, out / "tokenizer") for _ in range(options.rounds)]
        yield {name: medians(rounds)}


def kinds(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Row]]:
    """The encoder of each kind of tokenizer, and `encode_batch`, in CPU seconds of this process."""
    sentences: list[str] = []
    megabytes = 0.0
    for text in texts(options.books_small):
        if megabytes < SCRIPT_BYTES / 1e6:
            sentences += split_sentences(text)
            megabytes += len(text.encode()) / 1e6
    parts = [sentences[start : start + 1000] for start in range(0, len(sentences), 1000)]

    def speed(encode: Callable[[list[str]], Any]) -> float:
        started = time.process_time()
        for part in parts:
            encode(part)
        return megabytes / (time.process_time() - started)

    for kind in ("wordpiece", "bpe", "unigram"):
        out = folder / f"kind-{kind}"
        ours(options.books_small, out, None, 1, f"tokenizer.kind={kind}", watched=False)
        tokenizer = load_tokenizer(out / "tokenizer")
        backend, rounds = tokenizer.backend, []
        for _ in range(options.rounds):
            encoder, (_, encode_words) = Encoder(backend, tokenizer.vocabulary), word_encoder(tokenizer, False)
            assert encoder.cached, f"{kind}: has no short cuts"
            row = {"ours": speed(encoder.encode), "words": speed(encode_words)}
            row["encode_batch"] = speed(partial(backend.encode_batch, add_special_tokens=False))
            ratios = {f"{name} / encode_batch": row[name] / row["encode_batch"] for name in ("ours", "words")}
            rounds.append(row | ratios)
        expected = [i for part in parts for e in backend.encode_batch(part, add_special_tokens=False) for i in e.ids]
        assert np.array_equal(Encoder(backend).encode(sentences)[0], expected), f"{kind}: other ids than encode_batch's"
        yield {f"kind {kind}": medians(rounds)}


def medians(rounds: Sequence[Row]) -> Row:
    return {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}


def machine(rounds: int) -> dict[str, Any]:
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "load_at_start": os.getloadavg()[0], "rounds": rounds}


def english(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Row]]:
    """The result so far, after every round."""
    tokenizer, single, out = folder / "train" / "tokenizer", folder / "single.jsonl", folder / "out"
    train = ["source=jsonl", f"source.paths=[{options.books_small}]", f"out={folder / 'train'}"]
    subprocess.run([sys.executable, "-m", "data_prep", *train], cwd=ROOT, check=True, capture_output=True)
    single.write_text(json.dumps({"text": texts(options.books_small)[0]}) + "\n")
    names = [name for name in PEERS if name not in options.skip]
    small, large, memory = [], [], []
    for _ in range(options.rounds):
        small.append(small_round(options.books_small, single, folder, tokenizer, names))
        result = {"books_small": medians(small)}
        bare = ours(options.books_small, out, tokenizer, 1, "masking.baked_draws=0")
        result["books_small"]["disk_ratio without masks"] = bare["disk_ratio"]
        if options.books:
            large.append(books_round(options.books, folder, tokenizer))
            full = [ours(p, out, tokenizer, 1, "bucket_mib=4")["peak_mb"] for p in (options.books_small, options.books)]
            row = {"books / books_small": large[-1]["one_worker peak_mb"] / small[-1]["peak_mb"]}
            memory.append(row | {"books / books_small, bucket_mib=4": full[1] / full[0]})
            result |= {"books": medians(large), "memory": medians(memory)}
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--books-small", type=Path, default=os.environ.get("CLOZE_BOOKS_SMALL"), help="jsonl.zst, 12 MB"
    )
    parser.add_argument("--books", type=Path, help="jsonl.zst, 150 MB: speed and memory at size")
    parser.add_argument("--script", nargs="*", default=[], metavar="NAME=FILE", help="texts in other scripts")
    parser.add_argument("--kinds", action="store_true", help="the encoders alone, of each kind of tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=PEERS)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        documents = texts(options.books_small)[:: options.share]
        seconds = PEERS[options.peer](documents, options.tokenizer)
        print(seconds, sum(len(text.encode()) for text in documents) / 1e6)
        return
    if options.books_small is None and not options.script:
        print("prep: name a corpus: --books-small FILE.jsonl.zst (or CLOZE_BOOKS_SMALL), or --script NAME=FILE")
        return
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # to count what workers took that a server started
    result = json.loads(RESULTS.read_text()) | {"machine": machine(options.rounds)}  # what is not measured now stays
    with tempfile.TemporaryDirectory() as folder:
        for part in chain(
            scripts(options, Path(folder)) if options.script else (),
            kinds(options, Path(folder)) if options.kinds else (),
            english(options, Path(folder)) if options.books_small and not options.kinds else (),
        ):
            RESULTS.write_text(json.dumps(result := result | part, indent=1) + "\n")
            for name, row in part.items():
                for key, number in row.items():
                    print(f"{name:12} {key:36} {number:10.3f}")
            print(flush=True)


if __name__ == "__main__":
    main()
