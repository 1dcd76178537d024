"""Whole-word and span masking: slow references, BERT's rules, distributions, and shards made of Chinese."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze.corpus import verify
from cloze.corpus.manifest import read_manifest, sealed_json
from cloze.corpus.masking import Masking, MaskVocabulary, Unmasked, draw_masks
from cloze.corpus.peek import peek
from cloze.corpus.shards import Split
from cloze.corpus.tokenizer import load_tokenizer
from data_prep.text.encoder import Encoder
from data_prep.text.words import WordEncoder
from tests.support import CLS, SEP, default_masking, make_corpus, tokenizer_facts
from tests.unit.corpora import ROOT, prep, vocabulary, write_jsonl
from tests.unit.test_masking import GOLDEN, batches, flat, mix

SPAN = 0xD1B54A32D192ED03


def chosen_words(starts, first, total, sample_id, draw, masking):
    """Masked positions of one sample, in plain Python."""
    key = mix(mix(mix(masking.seed + GOLDEN) + draw * GOLDEN) + mix(sample_id + GOLDEN))
    words = []  # lists of positions; None where a segment ends
    for position in range(1, total):
        if position in (first - 1, total - 1):
            words.append(None)
        elif starts[position] or not words or words[-1] is None:
            words.append([position])
        else:
            words[-1].append(position)
    real_words = [i for i, word in enumerate(words) if word]
    candidates = sum(len(words[i]) for i in real_words)
    room = k = min(masking.max_predictions, max(1, round(masking.probability * total)), candidates)
    order = sorted(real_words, key=lambda i: (mix(key + (words[i][0] + 1) * GOLDEN) >> 16, words[i][0]))
    shares = [0.2 * 0.8**i for i in range(10)]
    masked = set()
    for anchor in order:
        dice = mix(mix(key ^ SPAN) + (words[anchor][0] + 1) * GOLDEN) >> 32
        bounds = [round(sum(shares[: i + 1]) / sum(shares) * 2**32) for i in range(9)]
        length = 1 + sum(dice >= bound for bound in bounds) if masking.strategy == "span" else 1
        for i in range(anchor, anchor + length):
            if i == len(words) or not words[i] or i in masked or len(words[i]) > room:
                break
            masked.add(i)
            room -= len(words[i])
    found = sorted(position for i in masked for position in words[i])
    return found or (words[order[0]][:k] if order else [])


@settings(max_examples=200, deadline=None)
@given(
    batches(),
    st.sampled_from(["whole_word", "span"]),
    st.floats(0.001, 1.0),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_equals_the_slow_reference(batch, strategy, probability, most, bits):
    samples, firsts, ids, vocab = batch
    masking = Masking(strategy=strategy, probability=probability, max_predictions=most, seed=bits)
    tokens = np.asarray([token for sample in samples for token in sample], np.uint32)
    starts = np.random.default_rng(bits).random(len(tokens)) < 0.6
    lengths = np.asarray([(first, len(sample)) for first, sample in zip(firsts, samples, strict=True)], np.uint16)
    masks = draw_masks(Unmasked(tokens, lengths, np.asarray(ids, np.uint64), starts), 2, masking, vocab)
    at, expected = 0, []
    for sample, first, i in zip(samples, firsts, ids, strict=True):
        expected.append(chosen_words(starts[at : at + len(sample)].tolist(), first, len(sample), i, 2, masking))
        at += len(sample)
    assert [[position for position, _ in sample] for sample in flat(masks)] == expected


def million(strategy):
    """A draw over a million tokens, words of 1 to 4 tokens: (starts, masks, lengths of runs of masked words)."""
    samples, length = 8_000, 128
    rng = np.random.default_rng(6)
    tokens = rng.integers(5, 1005, (samples, length)).astype(np.uint16)
    tokens[:, 0], tokens[:, 60], tokens[:, -1] = CLS, SEP, SEP
    starts = rng.random((samples, length)) < 0.7
    starts[:, [1, 61]] = True
    masks = draw_masks(
        Unmasked(
            tokens.reshape(-1),
            np.tile(np.asarray([[61, length]], np.uint16), (samples, 1)),
            np.arange(samples, dtype=np.uint64),
            starts.reshape(-1),
        ),
        0,
        default_masking(max_predictions=80, strategy=strategy),
        tokenizer_facts(1005).mask_vocabulary,
    )
    rows = np.repeat(np.arange(samples), masks.counts_N)
    masked = np.zeros((samples, length), bool)
    masked[rows, masks.positions_M] = True
    return starts, masks, masked


@pytest.mark.parametrize("strategy", ["whole_word", "span"])
def test_words_are_whole_and_the_share_is_right(strategy):
    starts, masks, masked = million(strategy)
    assert not masked[:, [0, 60, 127]].any()
    inside = ~starts
    inside[:, [0, 60, 61, 127]] = False
    assert (masked[:, 1:] == masked[:, :-1])[inside[:, 1:]].all()  # a word's tokens share its fate
    assert masks.counts_N.max() == 19  # round(0.15 * 128): never more
    assert masks.counts_N.mean() > 18.9  # and hardly less: a word that would exceed is passed over for a smaller
    shown = (masks.tokens_M == 4).mean()
    assert abs(shown - 0.8) < 5 * (0.8 * 0.2 / len(masks.tokens_M)) ** 0.5
    per_position = masked.mean(axis=0)
    ordinary = np.delete(per_position, [0, 60, 127])
    # A span starts anywhere but goes on only to its segment's end: positions at its beginning are met less often.
    assert ordinary.max() - ordinary.min() < (0.05 if strategy == "whole_word" else 0.12)


def test_span_lengths_are_geometric():
    """Two million tokens: how far the masks go on from each sample's first anchor, whose span always has room.

    Each length from 1 to 10 is inside 4.5 standard deviations of SpanBERT's share. Now and then another span adjoins.
    """
    samples, length = 4_000, 512
    tokens = np.full((samples, length), 9, np.uint16)
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    masking = default_masking(probability=0.02, max_predictions=10, strategy="span")
    masks = draw_masks(
        Unmasked(
            tokens.reshape(-1),
            np.tile(np.asarray([[length, length]], np.uint16), (samples, 1)),
            np.arange(samples, dtype=np.uint64),
            np.ones(samples * length, bool),
        ),
        0,
        masking,
        tokenizer_facts(1005).mask_vocabulary,
    )
    assert set(masks.counts_N.tolist()) == {10}
    lengths = []
    for sample, positions in enumerate(masks.positions_M.reshape(samples, 10).tolist()):
        key = mix(mix(mix(masking.seed + GOLDEN)) + mix(sample + GOLDEN))
        end = first = min(
            range(1, length - 1), key=lambda position: (mix(key + (position + 1) * GOLDEN) >> 16, position)
        )
        while end in positions:
            end += 1
        lengths += [end - first] if first < length - 11 else []
    for size, count in enumerate(np.bincount(lengths, minlength=11).tolist()):
        share = 0.2 * 0.8 ** (size - 1) / (1 - 0.8**10) if size else 0
        assert abs(count - len(lengths) * share) <= 4.5 * (len(lengths) * share * (1 - share)) ** 0.5, size
    assert abs(np.mean(lengths) - 3.797) < 0.2


def test_a_word_longer_than_the_budget_is_masked_in_part():
    tokens = np.asarray([CLS, 9, 9, 9, 9, SEP], np.uint16)
    masks = draw_masks(
        Unmasked(tokens, np.asarray([(6, 6)], np.uint16), np.ones(1, np.uint64), np.asarray([1, 1, 0, 0, 0, 1], bool)),
        0,
        default_masking(strategy="whole_word"),
        MaskVocabulary(mask_id=4, vocab_size=20, special_ids=(0, 1, 2, 3, 4)),
    )
    assert masks.positions_M.tolist() == [1]


# -- words of text ----------------------------------------------------------------------------------------------------

CHINESE = "我们在北京大学学习自然语言处理。我爱中国。"


def word_encoder(folder: Path, chinese: bool) -> tuple[WordEncoder, Encoder]:
    path = vocabulary(folder / "vocab.txt", *sorted(set(CHINESE) - {"处"}))  # one character is unknown
    tokenizer = load_tokenizer(path)
    encoder = Encoder(tokenizer.backend)
    return WordEncoder(encoder, tokenizer.backend, chinese), encoder


@given(st.lists(st.text(alphabet="ab Z中国我们北京処́豈\u3000,.-é😀\U00020000", max_size=30), max_size=5))
@settings(max_examples=150, deadline=None)
def test_ids_do_not_change(encoders, sentences):
    words, encoder = encoders
    expected_T, expected_S = encoder.encode(sentences)
    ids_T, lengths_S, starts_T = words.encode(sentences)
    assert ids_T.tolist() == expected_T.tolist()
    assert lengths_S.tolist() == expected_S.tolist()
    assert len(starts_T) == len(ids_T)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return word_encoder(tmp_path_factory.mktemp("v"), True)


def test_chinese_words_and_english_pieces(tmp_path, encoders):
    ids_T, _, starts_T = encoders[0].encode([CHINESE, "the catdog sat", "", "a"])
    words = encoders[0].encode([CHINESE])[2]
    cut = "".join("|" + char if start else char for char, start in zip(CHINESE, words.tolist(), strict=True))
    assert "|我们|在|" in cut
    assert "|学习|" in cut
    assert "北京大学|" in cut
    assert cut.endswith("|中国|。")
    assert len(ids_T) == len(starts_T)
    assert not starts_T[-6:].all()  # "##…" goes on with a word
    each, _ = word_encoder(tmp_path, False)
    assert each.encode([CHINESE])[2].all()


@pytest.mark.parametrize("strategy", ["whole_word", "span"])
@pytest.mark.parametrize("baked", [0, 1])
def test_shards_of_chinese_text(tmp_path, strategy, baked):
    texts = [f"{CHINESE}第{i}号文件。the catdog ran. {CHINESE}" for i in range(40)]
    path = write_jsonl(tmp_path / "zh.jsonl", texts)
    run = prep(
        "source=jsonl", f"source.paths=[{path}]", f"out={tmp_path / 'out'}", f"masking={strategy}",
        f"masking.baked_draws={baked}", "tokenizer.vocab_size=200", "executor.workers=1", "max_len=48",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert list(verify.faults(tmp_path / "out")) == []
    manifest = read_manifest(tmp_path / "out")
    assert manifest.masking.strategy == strategy
    split = Split(tmp_path / "out", manifest, "pass-00")
    samples = split.gather(np.arange(len(split)), 0)
    assert samples.word_starts_T is not None
    assert 0 < samples.word_starts_T.mean() < 1
    live = draw_masks(
        Unmasked(samples.tokens_T, samples.lengths_Nx2, samples.ids_N, samples.word_starts_T),
        0,
        manifest.masking,
        manifest.tokenizer.mask_vocabulary,
    )
    assert "我们 在" in "\n".join(text.plain for text in peek(tmp_path / "out", "pass-00", 20, 0))
    if baked:
        assert samples.masks is not None
        assert [a.tolist() for a in samples.masks] == [a.tolist() for a in live]


def test_without_jieba_there_is_one_line(tmp_path):
    program = textwrap.dedent(
        """
        import sys
        sys.modules["jieba"] = None
        from data_prep.text import words
        from cloze.errors import UserError
        try:
            words._jieba()
        except UserError as error:
            print(error)
        """
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cloze[zh]" in run.stdout
    assert run.stdout.count("\n") == 1


def test_a_corpus_of_whole_words_trains_without_jieba(tmp_path):
    """The loader draws from the bits in the shards: a draw that is not baked is made of them alone."""
    pytest.importorskip("torch")
    source = write_jsonl(tmp_path / "zh.jsonl", [f"{CHINESE}{i}。" * 3 for i in range(30)])
    run = prep(
        "source=jsonl", f"source.paths=[{source}]", f"out={tmp_path / 'out'}", "masking=whole_word",
        "tokenizer.vocab_size=200", "executor.workers=1", "max_len=48", "val_fraction=0",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    program = textwrap.dedent(
        f"""
        import sys, json
        sys.modules["jieba"] = None
        import numpy as np
        from pathlib import Path
        from pretrain.data.loader import TrainingCorpus
        corpus = TrainingCorpus(Path({str(tmp_path / "out")!r}))
        size = corpus.pass_sizes[0]
        batches = [corpus.training_batch(1, np.arange(e * size, (e + 1) * size)) for e in range(2)]
        print(json.dumps([len(batch.masked_index_M) for batch in batches]))
        """
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = json.loads(run.stdout)
    assert 0.8 < first / second < 1.25


def test_words_are_needed_where_the_manifest_says_so(tmp_path):
    make_corpus(tmp_path / "c", samples=40, val=0)
    body = json.loads((tmp_path / "c" / "manifest.json").read_text())
    body["masking"]["strategy"] = "span"
    (tmp_path / "c" / "manifest.json").write_text(sealed_json(body))
    assert any("word_starts" in fault for fault in verify.faults(tmp_path / "c"))
