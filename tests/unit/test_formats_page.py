"""A reader written from docs/formats.md alone, in plain integers, against ours: blocks, masks, order, fingerprint."""

import hashlib
import io
import json
import math
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cloze.corpus.shards import token_dtype
from cloze.corpus.tokenizer import load_tokenizer
from pretrain.checkpoint import TrainingState
from pretrain.data.loader import Layout, MicroBatches, TrainingCorpus
from tests.support import ROOT, default_masking, make_corpus

WORD = 2**64 - 1
G = 0x9E3779B97F4A7C15
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


class Sample(NamedTuple):
    id: int
    tokens: list[int]
    first: int
    label: int
    starts: list[int] | None  # bits: where words begin
    baked: list[tuple[list[int], list[int]]]  # of each draw: positions, tokens shown


def read_split(folder: Path, manifest: dict[str, Any], split: str) -> Iterator[Sample]:
    draws = manifest["baked_draws"]
    for shard in (shard for shard in manifest["shards"] if shard["split"] == split):
        data = (folder / split / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        number = 0
        blocks = shard["blocks"]
        for offset, size, crc in zip(blocks["offsets"], blocks["bytes"], blocks["crc32"], strict=True):
            block = data[offset : offset + size]
            assert zlib.crc32(block) == crc
            with tarfile.open(fileobj=io.BytesIO(block)) as tar:
                members = {
                    one.name.split(".", 1)[1]: np.load(io.BytesIO(tar.extractfile(one).read()))
                    for one in tar.getmembers()
                }
            tokens, lengths = members["tokens.npy"].tolist(), members["lengths.npy"].tolist()
            bits = None
            if "word_starts.npy" in members:
                bits = [byte >> (7 - i) & 1 for byte in members["word_starts.npy"].tolist() for i in range(8)]
            masks: list[list[tuple[list[int], list[int]]]] = []
            at = 0
            for draw in range(draws):
                masks.append([])
                for count in members["mask_counts.npy"][draw].tolist():
                    where, shown = (members[f"mask_{name}.npy"][at : at + count] for name in ("positions", "tokens"))
                    masks[-1].append((where.tolist(), shown.tolist()))
                    at += count
            start = 0
            for i, ((first, total), label) in enumerate(zip(lengths, members["random_next.npy"].tolist(), strict=True)):
                own = bits[start : start + total] if bits else None
                yield Sample(
                    shard["id"] << 32 | number, tokens[start : start + total], first, label, own,
                    [masks[draw][i] for draw in range(draws)],
                )  # fmt: skip
                start += total
                number += 1


def masked(sample: Sample, draw: int, manifest: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Positions and tokens shown there."""
    masking, facts, n = manifest["masking"], manifest["tokenizer"], len(sample.tokens)
    base = mix(mix((masking["seed"] + G) & WORD) + draw * G & WORD)
    key = mix(base + mix(sample.id + G & WORD) & WORD)

    def rank(p: int) -> int:
        return mix(key + (p + 1) * G & WORD) & ~0xFFFF | p

    candidates = [p for p in range(1, n - 1) if p != sample.first - 1]
    k = min(masking["max_predictions"], max(1, round(masking["probability"] * n)))
    if masking["strategy"] == "token":
        chosen = set(sorted(candidates, key=rank)[:k])
    else:
        chosen = set_of_words(sample, masking["strategy"], key, rank, k)
    ids = sorted(facts[f"{name}_id"] for name in ("pad", "unk", "cls", "sep", "mask"))
    ordinary = [token for token in range(facts["vocab_size"]) if token not in ids]
    shown = []
    for p in sorted(chosen):
        f = mix(mix(key ^ G) + p * G & WORD)
        if f >> 32 < round(0.8 * 2**32):
            shown.append(facts["mask_id"])
        elif f >> 32 < round(0.9 * 2**32):
            shown.append(ordinary[(f % 2**32) * len(ordinary) >> 32])
        else:
            shown.append(sample.tokens[p])
    return sorted(chosen), shown


def set_of_words(sample: Sample, strategy: str, key: int, rank: Any, k: int) -> set[int]:
    n = len(sample.tokens)
    assert sample.starts
    specials = {0, sample.first - 1, n - 1}
    words: list[list[int]] = []
    for p in range(n):
        if p in specials:
            continue
        if sample.starts[p] or p - 1 in specials:
            words.append([])
        words[-1].append(p)
    k = min(k, n - len(specials))
    chosen: set[int] = set()
    anchors = sorted(range(len(words)), key=lambda w: rank(words[w][0]))
    for anchor in anchors:
        longest = 1
        if strategy == "span":
            h = mix(mix(key ^ 0xD1B54A32D192ED03) + (words[anchor][0] + 1) * G & WORD) >> 32
            thresholds = [round(2**32 * (1 - 0.8**i) / (1 - 0.8**10)) for i in range(1, 10)]
            longest = 1 + sum(h >= threshold for threshold in thresholds)
        for w in range(anchor, min(anchor + longest, len(words))):
            other_segment = (words[w][0] < sample.first) != (words[anchor][0] < sample.first)
            if other_segment or words[w][0] in chosen or len(words[w]) > k - len(chosen):
                break
            chosen |= {*words[w]}
    return chosen or {*words[anchors[0]][:k]}


def sample_at(seed: int, epoch: int, i: int, n: int) -> int:
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    state = mix(mix(seed + G & WORD) ^ mix(epoch + G & WORD))
    keys = []
    for _ in range(4):
        state = mix(state + G & WORD)
        keys.append(state)
    v = i
    while True:
        row, column = divmod(v, columns)
        row = (row + (mix(column ^ keys[0]) >> 32)) % rows
        column = (column + (mix(row ^ keys[1]) >> 32)) % columns
        row = (row + (mix(column ^ keys[2]) >> 32)) % rows
        column = (column + (mix(row ^ keys[3]) >> 32)) % columns
        v = row * columns + column
        if v < n:
            return v


@pytest.mark.parametrize(("strategy", "seed"), [("token", 7), ("whole_word", -3), ("span", 2**40)])
def test_a_reader_written_from_the_page_sees_what_training_sees(strategy: str, seed: int, tmp_path: Path) -> None:
    """Micro-batches of two ranks, over the end of two passes and into their second draw."""
    masking = default_masking(strategy=strategy, seed=seed, max_predictions=5, probability=0.3)
    make_corpus(tmp_path, samples=45, passes=2, val=0, samples_per_block=10, masking=masking)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    passes = [[*read_split(tmp_path, manifest, f"pass-{p:02d}")] for p in range(manifest["passes"])]
    for sample in [one for samples in passes for one in samples]:
        for draw, baked in enumerate(sample.baked):
            assert baked == masked(sample, draw, manifest)
    run_seed, batch, size, ranks = 11, 16, 4, 2
    places = []  # of each position: epoch, sample
    for epoch in range(4):
        count = len(passes[epoch % 2])
        places += [(epoch, passes[epoch % 2][sample_at(run_seed, epoch, i, count)]) for i in range(count)]
    for rank in range(ranks):
        ours = MicroBatches(tmp_path, run_seed, Layout(rank, ranks, size, batch))
        for index in range(len(places) // batch * (batch // (size * ranks))):
            step, micro = divmod(index, batch // (size * ranks))
            first = step * batch + (micro * ranks + rank) * size
            expected: dict[str, list[int]] = {"ids": [], "types": [], "where": [], "labels": [], "nsp": []}
            for epoch, sample in places[first : first + size]:
                positions, shown = masked(sample, epoch // 2, manifest)
                start, ids = len(expected["ids"]), [*sample.tokens]
                expected["where"] += [start + p for p in positions]
                expected["labels"] += [ids[p] for p in positions]
                for p, token in zip(positions, shown, strict=True):
                    ids[p] = token
                expected["ids"] += ids
                expected["types"] += [int(p >= sample.first) for p in range(len(ids))]
                expected["nsp"].append(sample.label)
            found = ours[index]
            tensors = (found.input_ids_T, found.token_type_ids_T, found.masked_index_M, found.mlm_labels_M)
            for tensor, wanted in zip((*tensors, found.nsp_labels_N), expected.values(), strict=True):
                assert tensor[: len(wanted)].tolist() == wanted
            assert (found.num_tokens, found.num_masked) == (len(expected["ids"]), len(expected["where"]))


def test_version_2_names_held_out_splits(tmp_path: Path) -> None:
    """Read as the page says, and as evaluation does."""
    make_corpus(tmp_path, samples=9, passes=2, val=5, named_val={"news": 7, "a_b-2": 3})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    pattern = re.search(r"`val-` and `(\S+)`", PAGE)
    assert pattern
    named = {name for name in manifest["splits"] if re.fullmatch(rf"val-{pattern[1]}", name)}
    passes = {name for name in manifest["splits"] if name.startswith("pass-")}
    assert (manifest["version"], named, len(passes)) == (2, {"val-news", "val-a_b-2"}, manifest["passes"])
    assert {*manifest["splits"]} == named | passes | {"val"}
    ours = TrainingCorpus(tmp_path)
    for name in named | {"val"}:
        samples = [*read_split(tmp_path, manifest, name)]
        assert len(samples) == manifest["splits"][name]["samples"] == ours.held_out[name]
        found = ours.val_batch(np.arange(len(samples)), name)
        expected = []
        for sample in samples:
            shown = {**dict(enumerate(sample.tokens)), **dict(zip(*masked(sample, 0, manifest), strict=True))}
            expected += [shown[p] for p in range(len(shown))]
        assert found.input_ids_T.tolist() == expected


def test_the_fingerprint_is_computed_as_the_page_says(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path, samples=4, val=0)
    body = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    model = body["model"]
    pairs = {(number, token) for token, number in model["vocab"].items()}
    pairs |= {(added["id"], added["content"]) for added in body["added_tokens"]}
    deciding = {
        "model": [model[key] for key in ("unk_token", "continuing_subword_prefix", "max_input_chars_per_word")],
        "normalizer": body["normalizer"],
        "pre_tokenizer": body["pre_tokenizer"],
        "vocabulary": sorted(pairs),
    }
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint == manifest.tokenizer.fingerprint == load_tokenizer(tmp_path / "tokenizer").facts.fingerprint
    # and the checksum of the manifest
    raw = (tmp_path / "manifest.json").read_text()
    written = json.loads(raw)
    without = json.dumps({k: v for k, v in written.items() if k != "checksum"}, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(without.encode()).hexdigest() == written["checksum"]
    assert raw.replace(f'"checksum":"{written["checksum"]}",', "").removesuffix("\n") == without
    assert written["tokenizer"].keys() <= {*re.findall(r"`(\w+)`", PAGE)}
    assert token_dtype(2**16) == np.uint16


def test_every_key_is_on_the_page(tmp_path: Path) -> None:
    make_corpus(tmp_path, samples=4, val=2)
    written = json.loads((tmp_path / "manifest.json").read_text())
    names = {*re.findall(r"`([\w-]+)`", PAGE)}
    keys = {*written} | {key for name in ("tokenizer", "masking", "documents") for key in written[name]}
    keys |= {*written["shards"][0]} | {*written["shards"][0]["blocks"]} | {*written["splits"]["val"]}
    keys |= {field.name for field in fields(TrainingState)}
    assert keys - names == set()
