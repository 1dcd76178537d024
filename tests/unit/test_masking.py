"""The mask function against a slow reference in Python integers, and against BERT's rules."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze.corpus.masking import Masking, Masks, MaskVocabulary, Unmasked, draw_masks
from tests.support import CLS, MASK, PAD, SEP, UNK, default_masking, random_block, tokenizer_facts

GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64


def mix(x: int) -> int:
    x %= WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def reference(
    sample: Sequence[int], first: int, sample_id: int, draw: int, masking: Masking, vocabulary: MaskVocabulary
) -> list[tuple[int, int]]:
    """[(position, id shown)] of one sample."""
    key = mix(mix(mix(masking.seed + GOLDEN) + draw * GOLDEN) + mix(sample_id + GOLDEN))
    allowed = [i for i in range(len(sample)) if i not in (0, first - 1, len(sample) - 1)]
    hashes = {i: mix(key + (i + 1) * GOLDEN) for i in allowed}
    k = min(masking.max_predictions, max(1, round(masking.probability * len(sample))), len(allowed))
    chosen = sorted(sorted(allowed, key=lambda i: (hashes[i] >> 16, i))[:k])
    ordinary = [i for i in range(vocabulary.vocab_size) if i not in vocabulary.special_ids]
    shown = []
    for position in chosen:
        fate = mix(mix(key ^ GOLDEN) + position * GOLDEN)
        high, low = divmod(fate, 2**32)
        if high < round(0.8 * 2**32):
            shown.append(vocabulary.mask_id)
        elif high < round(0.9 * 2**32):
            shown.append(ordinary[low * len(ordinary) // 2**32])
        else:
            shown.append(sample[position])
    return list(zip(chosen, shown, strict=True))


def flat(masks: Masks) -> list[list[tuple[int, int]]]:
    """[(position, id shown)] of each sample."""
    ends = np.cumsum(masks.counts_N.astype(int)).tolist()
    pairs = list(zip(masks.positions_M.tolist(), masks.tokens_M.tolist(), strict=True))
    return [pairs[end - count : end] for end, count in zip(ends, masks.counts_N.tolist(), strict=True)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int], MaskVocabulary]:
    """(samples, first lengths, sample ids, vocabulary) with specials anywhere in the vocabulary."""
    size = draw(st.integers(6, 200_000))
    specials = draw(st.lists(st.integers(0, size - 1), min_size=5, max_size=5, unique=True))
    cls, sep, mask = specials[:3]
    samples, firsts = [], []
    for _ in range(draw(st.integers(1, 4))):
        ordinary = draw(st.lists(st.integers(0, size - 1), max_size=30))
        cut = draw(st.none() | st.integers(0, len(ordinary)))
        tail = [] if cut is None else [*ordinary[cut:], sep]
        samples.append([cls, *ordinary[:cut], sep, *tail])
        firsts.append(len(samples[-1]) - len(tail))
    ids = draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(samples), max_size=len(samples)))
    return samples, firsts, ids, MaskVocabulary(mask_id=mask, vocab_size=size, special_ids=tuple(specials))


@settings(max_examples=300, deadline=None)
@given(
    batches(),
    st.integers(0, 1000),
    st.floats(0.001, 1.0),
    st.integers(1, 40),
    st.integers(-(2**63), 2**64 - 1),
)
def test_equals_the_slow_reference(
    batch: tuple[list[list[int]], list[int], list[int], MaskVocabulary],
    draw: int,
    probability: float,
    most: int,
    seed: int,
) -> None:
    samples, firsts, ids, vocabulary = batch
    masking = Masking(strategy="token", probability=probability, max_predictions=most, seed=seed)
    tokens_T = np.asarray([token for sample in samples for token in sample], np.uint32)
    lengths = np.asarray([(first, len(sample)) for first, sample in zip(firsts, samples, strict=True)], np.uint16)
    masks = draw_masks(Unmasked(tokens_T, lengths, np.asarray(ids, np.uint64)), draw, masking, vocabulary)
    expected = [
        reference(sample, first, i, draw, masking, vocabulary)
        for sample, first, i in zip(samples, firsts, ids, strict=True)
    ]
    assert flat(masks) == expected


def test_no_samples() -> None:
    masks = draw_masks(
        Unmasked(np.zeros(0, np.uint16), np.zeros((0, 2), np.uint16), np.zeros(0, np.uint64)),
        0,
        default_masking(),
        tokenizer_facts(99).mask_vocabulary,
    )
    assert [len(part) for part in masks] == [0, 0, 0]


def test_a_sample_without_a_maskable_token_has_no_masks() -> None:
    lengths = np.asarray([(2, 2), (2, 3)], np.uint16)  # [CLS][SEP] and [CLS][SEP][SEP]
    tokens = np.asarray([CLS, SEP, CLS, SEP, SEP], np.uint16)
    masks = draw_masks(
        Unmasked(tokens, lengths, np.arange(2, dtype=np.uint64)),
        0,
        default_masking(),
        tokenizer_facts(99).mask_vocabulary,
    )
    assert masks.counts_N.tolist() == [0, 0]


def test_independent_of_the_batch_around_it() -> None:
    block = random_block(random.Random(1), samples=50, max_len=70, vocab_size=500)
    vocabulary = tokenizer_facts(500).mask_vocabulary
    ids = np.arange(50, dtype=np.uint64) * np.uint64(977)
    whole = flat(draw_masks(Unmasked(block.tokens_T, block.lengths_Nx2, ids), 3, default_masking(), vocabulary))
    starts = np.cumsum([0, *block.lengths_Nx2[:, 1].astype(int)])
    order = np.random.default_rng(0).permutation(50)
    for some in (order[:1], order[1:8], order[8:]):
        tokens = np.concatenate([block.tokens_T[starts[i] : starts[i + 1]] for i in some])
        part = flat(draw_masks(Unmasked(tokens, block.lengths_Nx2[some], ids[some]), 3, default_masking(), vocabulary))
        assert part == [whole[i] for i in some]


def test_samples_of_the_greatest_length() -> None:
    """Positions up to 65,534 fit beside the hash."""
    tokens = np.full(0xFFFF, 9, np.uint16)
    tokens[[0, 100, -1]] = CLS, SEP, SEP
    masking = default_masking(probability=0.9, max_predictions=60_000)
    masks = draw_masks(
        Unmasked(tokens, np.asarray([(101, 0xFFFF)], np.uint16), np.ones(1, np.uint64)),
        0,
        masking,
        tokenizer_facts(50).mask_vocabulary,
    )
    assert masks.counts_N.tolist() == [round(0.9 * 0xFFFF)]
    assert len(set(masks.positions_M.tolist())) == round(0.9 * 0xFFFF)
    assert not {0, 100, 0xFFFE} & set(masks.positions_M.tolist())


@pytest.fixture(scope="module")
def million() -> tuple[np.ndarray, np.ndarray, Masks]:
    """(ids under the masks, positions' samples, masks) of one draw over a million tokens, 1,000 ordinary ids."""
    samples, length, vocab = 8_000, 128, 1_005
    rng = np.random.default_rng(5)
    tokens = rng.integers(5, vocab, (samples, length)).astype(np.uint16)
    tokens[:, 0], tokens[:, 60], tokens[:, -1] = CLS, SEP, SEP
    lengths = np.tile(np.asarray([[61, length]], np.uint16), (samples, 1))
    masks = draw_masks(
        Unmasked(tokens.reshape(-1), lengths, np.arange(samples, dtype=np.uint64)),
        0,
        default_masking(max_predictions=80),
        tokenizer_facts(vocab).mask_vocabulary,
    )
    rows = np.repeat(np.arange(samples), masks.counts_N)
    return tokens[rows, masks.positions_M], rows, masks


def within(count: float, trials: int, p: float) -> bool:
    """Inside five standard deviations of a binomial: a right function fails once in two million."""
    return abs(count - trials * p) < 5 * (trials * p * (1 - p)) ** 0.5


def test_every_position_is_equally_likely(million: tuple[np.ndarray, np.ndarray, Masks]) -> None:
    _, _, masks = million
    assert set(masks.counts_N.tolist()) == {19}  # round(0.15 * 128)
    per_position = np.bincount(masks.positions_M, minlength=128)
    assert per_position[[0, 60, 127]].tolist() == [0, 0, 0]
    assert all(within(n, 8_000, 19 / 125) for i, n in enumerate(per_position.tolist()) if i not in (0, 60, 127))


def test_eighty_ten_ten(million: tuple[np.ndarray, np.ndarray, Masks]) -> None:
    originals, _, masks = million
    total = len(originals)
    as_mask = int((masks.tokens_M == MASK).sum())
    unchanged = int((masks.tokens_M == originals).sum())
    assert within(as_mask, total, 0.8)
    assert within(unchanged, total, 0.1 + 0.1 / 1_000)  # a random id is the original once in a thousand
    assert within(total - as_mask - unchanged, total, 0.1 * 999 / 1_000)


def test_random_replacements_are_uniform_over_ordinary_ids(million: tuple[np.ndarray, np.ndarray, Masks]) -> None:
    originals, _, masks = million
    replaced = masks.tokens_M[(masks.tokens_M != MASK) & (masks.tokens_M != originals)]
    counts = np.bincount(replaced, minlength=1_005)
    assert counts[[PAD, UNK, CLS, SEP, MASK]].tolist() == [0] * 5
    assert len(counts) == 1_005  # nothing at or above the vocabulary's size: padded rows are never drawn
    expected = len(replaced) / 1_000
    chi_squared = float(((counts[5:] - expected) ** 2 / expected).sum())
    assert abs(chi_squared - 999) < 5 * (2 * 999) ** 0.5  # mean and variance of chi-squared with 999 degrees


def test_draws_and_samples_are_independent(million: tuple[np.ndarray, np.ndarray, Masks]) -> None:
    """Another draw, seed or id masks other positions: they meet as often as chance has it."""
    block = random_block(random.Random(2), samples=3_000, max_len=100, vocab_size=99)
    vocabulary = tokenizer_facts(99).mask_vocabulary
    ids = np.arange(3_000, dtype=np.uint64)

    def chosen(draw: int, seed: int, offset: int) -> set[tuple[int, int]]:
        masking = default_masking(seed=seed, probability=0.3, max_predictions=99)
        masks = draw_masks(
            Unmasked(block.tokens_T, block.lengths_Nx2, ids + np.uint64(offset)), draw, masking, vocabulary
        )
        return {(i, position) for i, sample in enumerate(flat(masks)) for position, _ in sample}

    base = chosen(0, 7, 0)
    lengths = block.lengths_Nx2[:, 1].astype(int)
    counts = np.bincount([i for i, _ in base], minlength=3_000)
    chance = float((counts**2 / (lengths - 3)).sum())  # of c chosen positions c/(n-3) are chosen again
    for other in (chosen(1, 7, 0), chosen(0, 8, 0), chosen(0, 7, 1), chosen(0, 7, 2**40)):
        assert abs(len(base & other) - chance) < 5 * chance**0.5


@pytest.mark.parametrize("strategy", ["token", "whole_word", "span"])
def test_of_two_separators_none_is_masked(strategy):
    """Where all is to be masked, all is but [CLS] and the [SEP]s: two between segments, one after a single one."""
    rng = np.random.default_rng(2)
    lengths, expected = [], []
    for _ in range(50):
        first, second = rng.integers(1, 9, 2).tolist()
        if rng.random() < 0.3:
            total = first = first + 2
            specials = {0, total - 1}
        else:
            first += 3
            total = first + second + 1
            specials = {0, first - 2, first - 1, total - 1}
        lengths.append((first, total))
        expected.append([position for position in range(total) if position not in specials])
    tokens = np.full(sum(total for _, total in lengths), 9, np.uint16)
    masks = draw_masks(
        Unmasked(tokens, np.asarray(lengths, np.uint16), np.arange(50, dtype=np.uint64), rng.random(len(tokens)) < 0.5),
        0,
        Masking(strategy=strategy, probability=1.0, max_predictions=99, seed=1),
        MaskVocabulary(mask_id=4, vocab_size=20, special_ids=(0, 1, 2, 3, 4, 11, 12), separators=2),
    )
    found = np.split(masks.positions_M, np.cumsum(masks.counts_N)[:-1])
    assert [positions.tolist() for positions in found] == expected
    assert {*masks.tokens_M.tolist()} <= {4, 5, 6, 7, 8, 9, 10, *range(13, 20)}
