"""Pairs against a plain port of BERT's algorithm, and the properties that the port cannot state."""

import math
import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze.corpus.diagnosis import length_guess
from data_prep.stages.pairs import Bucket, SegmentPairs, assemble, make_samples, sample_lengths, unpaired

CLS, SEP = 2, 3
DOCUMENTS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=8)
MAX_LEN = st.integers(8, 64)
SEED = st.integers(0, 2**32)


def bucket_of(documents: list[list[int]], origins: list[int] | None = None) -> Bucket:
    return Bucket(
        np.array([len(document) for document in documents]),
        np.array([length for document in documents for length in document]),
        np.array(origins or range(len(documents)), dtype=np.uint64),
    )


def owners(documents: list[list[int]]) -> tuple[list[int], list[int]]:
    """Of every token: its document, and its sentence counted through all documents."""
    document_of = [d for d, document in enumerate(documents) for _ in range(sum(document))]
    lengths = [length for document in documents for length in document]
    return document_of, [s for s, length in enumerate(lengths) for _ in range(length)]


def bert_reference(documents: list[list[list[int]]], max_len: int, short: float, rng: random.Random) -> list[tuple]:
    """`create_instances_from_document` of BERT over lists of token ids, with a sure other document, and two changes.

    The coin makes up for lone sentences; a random B is as long as a true one would be, the best of four places.
    """
    samples: list[tuple] = []
    chunks: dict[int, list[bool]] = {}  # of each size of A, whether lone
    true_b: dict[int, int] = {}
    excess = 0.0
    for index, document in enumerate(documents):
        room = max_len - 3
        target = rng.randint(2, room) if rng.random() < short else room
        chunk, length, i = [], 0, 0
        while i < len(document):
            chunk.append(document[i])
            length += len(document[i])
            if i == len(document) - 1 or (length >= target and len(chunk) >= 2):
                lone = len(chunk) == 1
                a_end = 1 if lone else rng.randint(1, len(chunk) - 1)
                a = list(chain.from_iterable(chunk[:a_end]))
                rest = list(chain.from_iterable(chunk[a_end:]))
                size = math.frexp(len(a))[1]
                chunks.setdefault(size, []).append(lone)
                share = sum(chunks[size]) / len(chunks[size])
                chance = 1 if lone else min(max((0.5 - share) / (1 - share) - excess / 64, 0), 1)
                excess += chance - 0.5
                if rng.random() < chance:
                    wanted, found = true_b.get(size, room // 2) if lone else len(rest), []
                    for _ in range(4):
                        other = rng.choice([d for d in range(len(documents)) if d != index])
                        start, b = rng.randrange(len(documents[other])), []
                        for sentence in documents[other][start:]:
                            b = b + sentence
                            if len(b) >= wanted:
                                break
                        found.append(b)
                    b, label = min(found, key=lambda b: abs(len(b) - wanted)), 1
                    i -= len(chunk) - a_end
                else:
                    b, label = rest, 0
                    true_b[size] = len(rest)
                while len(a) + len(b) > room:
                    longer = a if len(a) > len(b) else b
                    longer.pop(0 if rng.random() < 0.5 else -1)
                samples.append((tuple(a), tuple(b), label))
                chunk, length = [], 0
            i += 1
    return samples


def sop_reference(documents: list[list[list[int]]], max_len: int, short: float, rng: random.Random) -> list[tuple]:
    """ALBERT's sentence order pairs over lists of token ids: gather to the target, cut at random, swap half of them."""
    samples = []
    for document in documents:
        room = max_len - 3
        target = rng.randint(2, room) if rng.random() < short else room
        chunk: list[list[int]] = []
        for i, sentence in enumerate(document):
            chunk.append(sentence)
            if i + 1 < len(document) and (len(chunk) < 2 or sum(map(len, chunk)) < target):
                continue
            if len(chunk) >= 2:
                cut = rng.randint(1, len(chunk) - 1)
                pair = [list(chain.from_iterable(chunk[:cut])), list(chain.from_iterable(chunk[cut:]))]
                label = rng.randrange(2)
                a, b = pair[::-1] if label else pair
                while len(a) + len(b) > room:
                    (a if len(a) > len(b) else b).pop(rng.choice((0, -1)))
                samples.append((tuple(a), tuple(b), label))
            chunk = []
    return samples


def full_sentences_reference(documents: list[list[list[int]]], max_len: int) -> list[tuple]:
    """RoBERTa's DOC-SENTENCES, greedily: a sentence that does not fit begins a sample, one that never fits is cut."""
    samples = []
    for document in documents:
        row: list[int] = []
        for sentence in document:
            if row and len(row) + len(sentence) > max_len - 2:
                samples.append(row)
                row = []
            row = row + sentence
            while len(row) > max_len - 2:
                samples.append(row[: max_len - 2])
                row = row[max_len - 2 :]
        samples += [row] if row else []
    return [(tuple(row), (), 0) for row in samples]


def numbered(documents: list[list[int]]) -> list[list[list[int]]]:
    """Documents whose tokens are numbered throughout."""
    numbers = iter(range(10**9))
    return [[[next(numbers) for _ in range(length)] for length in document] for document in documents]


def as_tuples(samples: SegmentPairs) -> list[tuple]:
    columns = (samples.a_Nx2.tolist(), samples.b_Nx2.tolist(), samples.label_N.tolist())
    return [(tuple(range(*a)), tuple(range(*b)), label) for a, b, label in zip(*columns, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "reference"), [("nsp", bert_reference), ("sop", sop_reference)])
def test_distribution_is_that_of_the_reference(objective, reference):
    """Many runs over one small corpus: number of samples, labels, lengths and first sentences agree on average."""
    documents = [[4, 9, 2, 7], [3], [12, 1, 1, 5, 6, 2], [8, 8, 8]]
    tokens = numbered(documents)
    rng, runs = random.Random(0), 4000
    theirs, ours = Counter(), Counter()
    for run in range(runs):
        for counter, samples in (
            (theirs, reference(tokens, 16, 0.3, rng)),
            (ours, as_tuples(make_samples(objective, bucket_of(documents), 16, 0.3, (run,)))),
        ):
            counter["samples"] += len(samples)
            for a, b, label in samples:
                counter.update([("label", label), ("a", len(a)), ("b", len(b)), ("starts", a[0]), ("follows", b[0])])
    for key in theirs.keys() | ours.keys():
        tolerance = 6 * (theirs[key] + ours[key]) ** 0.5 + 6
        assert abs(theirs[key] - ours[key]) <= tolerance, (key, theirs[key], ours[key])


@given(documents=DOCUMENTS, max_len=MAX_LEN, seed=SEED)
@settings(max_examples=200, deadline=None)
def test_full_sentences_are_those_of_the_reference(documents, max_len, seed):
    samples = as_tuples(make_samples("none", bucket_of(documents), max_len, 0.5, (seed,)))
    assert sorted(samples) == full_sentences_reference(numbered(documents), max_len)


DEVIATIONS = 4.5  # a right function fails once in 150,000


def test_labels_over_a_million_tokens_sop():
    """4,000 documents of 40 sentences of 7 tokens: half of the pairs are swapped."""
    labels = make_samples("sop", bucket_of([[7] * 40] * 4000), 32, 0.0, (1,)).label_N
    assert len(labels) > 30_000
    assert abs(int(labels.sum()) - len(labels) / 2) < DEVIATIONS * (len(labels) / 4) ** 0.5


@pytest.mark.parametrize("lone_share", [0.0, 0.1, 0.3, 0.45])
@pytest.mark.parametrize("max_len", [32, 128])
def test_random_nexts_are_half_of_the_pairs_and_lengths_do_not_tell_which(lone_share, max_len):
    """Documents of 1 to 30 sentences of 2 to 25 tokens, of which the given share has one: labels can be balanced."""
    rng = np.random.default_rng(0)
    counts = np.where(rng.random(20_000) < lone_share, 1, rng.integers(2, 31, 20_000)).tolist()
    if lone_share == 0.45:
        counts = [min(count, 2) for count in counts]  # the others make one true pair, or are two lone sentences
    documents = [rng.integers(2, 26, count).tolist() for count in counts]
    samples = make_samples("nsp", bucket_of(documents), max_len, 0.1, (1,))
    labels = samples.label_N
    assert len(labels) >= 20_000
    assert abs(labels.mean() - 0.5) < 0.012
    lengths_Nx2 = np.concatenate([np.diff(samples.a_Nx2), np.diff(samples.b_Nx2)], axis=1)
    assert length_guess(lengths_Nx2, labels) < 0.55


def test_documents_of_one_sentence_are_paired_with_others_only():
    documents = [[9]] * 300
    assert make_samples("nsp", bucket_of(documents), 32, 0.1, (1,)).label_N.tolist() == [1] * 300


def test_where_most_are_lone_every_pair_with_a_choice_is_true():
    """Seven in ten documents have one sentence: of the others, what can be is a true next."""
    documents = [[9]] * 7000 + [[9, 9]] * 3000
    np.random.default_rng(0).shuffle(order := np.arange(10_000))
    samples = make_samples("nsp", bucket_of([documents[i] for i in order]), 32, 0.0, (1,))
    assert abs(int((samples.label_N == 0).sum()) - 3000) <= 20


@pytest.mark.parametrize(
    ("objective", "origins", "expected"),
    [
        ("none", [0, 1, 2], [False, False, False]),
        ("sop", [0, 1, 2], [True, False, True]),
        ("nsp", [0, 1, 2], [False, False, False]),
        ("nsp", [5, 5, 5], [True, False, True]),
    ],
)
def test_documents_that_make_no_sample_are_told(objective, origins, expected):
    documents = [[4], [3, 5], [6]]
    bucket = bucket_of(documents, origins)
    assert unpaired(objective, bucket).tolist() == expected
    seen = {t for a, b, _ in as_tuples(make_samples(objective, bucket, 64, 0.0, (1,))) for t in (*a, *b)}
    assert {d for d, t in enumerate([0, 4, 12]) if t not in seen} == {d for d, lost in enumerate(expected) if lost}


def test_short_targets_over_a_million_tokens():
    """One document in ten aims at a length from 2 to 29, each as often."""
    documents = [[1] * 40] * 30_000
    samples = make_samples("sop", bucket_of(documents), 32, 0.1, (1,))
    lengths = (samples.a_Nx2[:, 1] - samples.a_Nx2[:, 0]) + (samples.b_Nx2[:, 1] - samples.b_Nx2[:, 0])
    starts = np.minimum(samples.a_Nx2[:, 0], samples.b_Nx2[:, 0])
    first = lengths[starts % 40 == 0]  # of each document the first sample, which reaches the target
    assert len(first) == 30_000
    for length, count in enumerate(np.bincount(first, minlength=30).tolist()):
        share = (0.1 / 28 if length >= 2 else 0) + 0.9 * (length == 29)
        assert abs(count - 30_000 * share) <= DEVIATIONS * (30_000 * share * (1 - share)) ** 0.5, length


@given(documents=DOCUMENTS, max_len=MAX_LEN, short=st.sampled_from([0.0, 0.1, 1.0]), seed=SEED)
@settings(max_examples=200, deadline=None)
def test_nsp_segments_are_what_their_label_says(documents, max_len, short, seed):
    samples = make_samples("nsp", bucket_of(documents), max_len, short, (seed, 0, 0))
    document_of, sentence_of = owners(documents)
    for a, b, label in as_tuples(samples):
        assert a
        assert b
        assert len(a) + len(b) <= max_len - 3
        assert len({document_of[t] for t in a}) == len({document_of[t] for t in b}) == 1
        assert (document_of[a[0]] != document_of[b[0]]) == label
        if not label:
            assert sentence_of[b[0]] > sentence_of[a[-1]]
    if len(documents) == 1:
        assert not samples.label_N.any()


@given(documents=DOCUMENTS, seed=SEED)
@settings(max_examples=100, deadline=None)
def test_nsp_uses_every_sentence_of_other_than_lone_documents(documents, seed):
    """What a random next displaced is gathered again: every sentence is the start of an A or inside a true pair."""
    samples = make_samples("nsp", bucket_of(documents), 500, 0.0, (seed,))
    _, sentence_of = owners(documents)
    seen = {sentence_of[t] for a, b, label in as_tuples(samples) for t in (a if label else a + b)}
    if len(documents) > 1 or len(documents[0]) > 1:
        assert seen == set(sentence_of)


def test_parts_of_one_document_are_never_random_to_each_other():
    documents = [[5, 5, 5], [6, 6], [7, 7, 7, 7], [8]]
    origins = [9, 9, 9, 4]
    for seed in range(50):
        samples = make_samples("nsp", bucket_of(documents, origins), 20, 0.1, (seed,))
        document_of, _ = owners(documents)
        for a, b, label in as_tuples(samples):
            if label:
                assert origins[document_of[a[0]]] != origins[document_of[b[0]]]


@given(documents=DOCUMENTS, max_len=MAX_LEN, seed=SEED)
@settings(max_examples=100, deadline=None)
def test_sop_swaps_neighbours(documents, max_len, seed):
    document_of, sentence_of = owners(documents)
    for a, b, label in as_tuples(make_samples("sop", bucket_of(documents), max_len, 0.1, (seed,))):
        front, back = (b, a) if label else (a, b)
        assert len(a) + len(b) <= max_len - 3
        assert document_of[front[0]] == document_of[back[-1]]
        assert sentence_of[front[-1]] < sentence_of[back[0]]


@given(documents=DOCUMENTS, max_len=MAX_LEN, seed=SEED)
@settings(max_examples=100, deadline=None)
def test_full_sentences_tile_every_document(documents, max_len, seed):
    samples = make_samples("none", bucket_of(documents), max_len, 0.5, (seed,))
    document_of, sentence_of = owners(documents)
    segments = sorted(a for a, _, _ in as_tuples(samples))
    assert [token for segment in segments for token in segment] == list(range(len(document_of)))
    ends = {t for t in range(len(sentence_of)) if t + 1 == len(sentence_of) or sentence_of[t] != sentence_of[t + 1]}
    for segment in segments:
        assert len(segment) <= max_len - 2
        assert len({document_of[t] for t in segment}) == 1
        assert segment[-1] in ends or len(segment) == max_len - 2
    assert not samples.label_N.any()


@pytest.mark.parametrize("objective", ["nsp", "sop", "none"])
def test_samples_are_a_function_of_the_key(objective):
    bucket = bucket_of([[3, 4, 5, 6]] * 20)
    first = as_tuples(make_samples(objective, bucket, 16, 0.1, (1, 0, 0)))
    assert first == as_tuples(make_samples(objective, bucket, 16, 0.1, (1, 0, 0)))
    for other in ((2, 0, 0), (1, 1, 0), (1, 0, 1)):
        assert first != as_tuples(make_samples(objective, bucket, 16, 0.1, other))


@given(documents=DOCUMENTS, objective=st.sampled_from(["nsp", "sop", "none"]), seed=SEED, separators=st.integers(1, 2))
@settings(max_examples=100, deadline=None)
def test_assembled_tokens(documents, objective, seed, separators):
    samples = make_samples(objective, bucket_of(documents), 24, 0.1, (seed,), separators)
    ids = np.arange(10, 10 + sum(map(sum, documents)), dtype=np.uint16)
    tokens_T, lengths_Nx2 = assemble(samples, ids, CLS, SEP, separators)
    expected, lengths = [], []
    for a, b, _ in as_tuples(samples):
        segment_a = [CLS, *ids[list(a)], *[SEP] * (separators if b else 1)]
        segment_b = [*ids[list(b)], SEP] if b else []
        assert len(segment_a + segment_b) <= 24
        expected += segment_a + segment_b
        lengths.append([len(segment_a), len(segment_a + segment_b)])
    assert tokens_T.tolist() == expected
    assert tokens_T.dtype == np.uint16
    assert lengths_Nx2.tolist() == sample_lengths(samples, separators).tolist() == lengths
