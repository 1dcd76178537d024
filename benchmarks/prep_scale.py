"""Preparation at size: `python benchmarks/prep_scale.py --books FILE.jsonl.zst [--files 100_000] [--gigabytes 5]`.

Many small files, then one large one, both made of the sentences of books in another order for each document, are
prepared with the default settings. What a watcher sees of the processes (open files, memory) and of the unfinished work
(tasks, buckets, intermediate bytes) stands beside what docs/scaling.md expects, which `expected` computes. JSON goes
into benchmarks/results/prep_scale.json, part by part.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import zstandard
from prep import machine

from cloze.corpus.manifest import read_manifest
from data_prep.text.sentences import split_sentences

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "prep_scale.json"
Row = dict[str, float]
FILE_SENTENCES = 20  # of a small file
BYTES_A_TOKEN = 4.5  # of English text
BYTES_A_SENTENCE = 108


def expected(text_bytes: int, files: int) -> Row:
    """What data_prep/sources/base.py and data_prep/plan.py make of so much English text at the defaults."""
    task_bytes = max(min(2**26, max(2**20, text_bytes // 128)), text_bytes // 4096)
    buckets = min(2048, -(-text_bytes // 2**24))
    tokens, segments = text_bytes / BYTES_A_TOKEN, -(-task_bytes // int(4e6 * BYTES_A_TOKEN))
    tasks = max(1, -(-text_bytes // task_bytes))
    borders = tasks * segments * (buckets + max(1, round(buckets / 100)) + 1) * 3 * 8
    return {
        "map_tasks": tasks,
        "buckets": buckets + max(1, round(buckets / 100)),
        "intermediate_bytes": 2 * tokens + 2 * text_bytes / BYTES_A_SENTENCE + borders,
        "reads_of_a_bucket": tasks * segments,
        "files": files,
    }


def watched(command: Sequence[str], work: Path) -> Row:
    """Run a preparation: seconds, and the most that was seen of open files, memory and intermediate bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    most: Row = {"open_files": 0, "peak_mb": 0, "intermediate_bytes": 0, "map_tasks": 0}
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def watch() -> None:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error, OSError):
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                most["open_files"] = max(most["open_files"], *(each.num_fds() for each in tree))
                most["peak_mb"] = max(most["peak_mb"], sum(each.memory_full_info().pss for each in tree) / 1e6)
                size = sum(path.stat().st_size for path in (work / "map").iterdir())
                most["intermediate_bytes"] = max(most["intermediate_bytes"], size)
                if not most["map_tasks"]:
                    plan = json.loads((work / "plan.json").read_text())
                    most.update(map_tasks=len(plan["tasks"]), buckets=sum(plan["buckets"]))
                    most["plan_bytes"] = (work / "plan.json").stat().st_size
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    most["seconds"] = time.perf_counter() - started
    watcher.join()
    assert code == 0, command
    return most


def prepared(source: Sequence[str], out: Path, workers: int) -> Row:
    command = [sys.executable, "-m", "data_prep", *source, f"out={out}", f"executor.workers={workers}"]
    row = watched(command, out / ".work")
    manifest = read_manifest(out)
    row |= {"files": manifest.source["files"], "text_bytes": manifest.documents["bytes"]}
    row |= {"documents": manifest.documents["kept"], "tokens": sum(split.tokens for split in manifest.splits.values())}
    row["shard_bytes"] = sum(shard.bytes for shard in manifest.shards)
    row["manifest_bytes"] = (out / "manifest.json").stat().st_size
    row["mb_per_second"] = row["text_bytes"] / 1e6 / row["seconds"]
    shutil.rmtree(out)
    return row


def documents(sentences: Sequence[str], size: int, rng: random.Random) -> Iterator[str]:
    """Documents of `size` sentences each, without end: all sentences in another order each time round."""
    shuffled = list(sentences)
    while True:
        rng.shuffle(shuffled)
        yield from ("\n".join(shuffled[begin : begin + size]) for begin in range(0, len(shuffled), size))


def many_files(sentences: Sequence[str], folder: Path, count: int) -> list[str]:
    made = documents(sentences, FILE_SENTENCES, random.Random(0))
    for number in range(count):
        path = folder / "files" / f"{number // 1000:03d}" / f"{number:06d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(next(made))
    return ["source=text", f"source.paths=[{folder}/files/*/*.txt]", "source.document=file"]


def one_file(sentences: Sequence[str], folder: Path, size: int) -> list[str]:
    path = folder / "large.jsonl"
    with path.open("w") as file:
        for text in documents(sentences, 150, random.Random(1)):
            file.write(json.dumps({"text": text}) + "\n")
            if file.tell() >= size:
                break
    return ["source=jsonl", f"source.paths=[{path}]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=Path, default=os.environ.get("CLOZE_BOOKS_SMALL"), help="jsonl.zst to repeat")
    parser.add_argument("--files", type=int, default=100_000, help="small files; 0 = none")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of one large file; 0 = none")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where there is room for two and a half times the text")
    options = parser.parse_args()
    if options.books is None:
        print("prep_scale: name a corpus: --books FILE.jsonl.zst (or CLOZE_BOOKS_SMALL)")
        return
    data = zstandard.ZstdDecompressor().stream_reader(options.books.open("rb")).read()
    sentences = [sentence for line in data.splitlines() for sentence in split_sentences(json.loads(line)["text"])]
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result |= {"machine": machine(1) | {"workers": options.workers}}
    result["a terabyte, on paper"] = expected(10**12, 0)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        parts = {
            f"{options.files:,} files": lambda: many_files(sentences, folder, options.files),
            f"{options.gigabytes:g} GB in one file": lambda: one_file(sentences, folder, int(options.gigabytes * 1e9)),
        }
        for part, wanted in zip(parts, (options.files, options.gigabytes), strict=True):
            if not wanted:
                continue
            row = prepared(parts[part](), folder / "out", options.workers)
            result[part] = row | {
                f"expected {key}": value for key, value in expected(int(row["text_bytes"]), int(row["files"])).items()
            }
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
            for key, value in result[part].items():
                print(f"{part:22} {key:28} {value:18,.1f}")
            print(flush=True)


if __name__ == "__main__":
    main()
