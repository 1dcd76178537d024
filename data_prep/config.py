"""The schema of conf/prep.yaml. Values stand there; what they mean and which are valid stands here. Pure."""

import math
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any, ClassVar

from cloze.schema import Variant, doc, require
from data_prep.sources.base import Source
from data_prep.text.cleaning import SCRIPTS

_FEWEST_OF_BYTES = 512


class Objective(StrEnum):
    nsp = auto()  # next sentence prediction: B follows A, or is from elsewhere
    sop = auto()  # sentence order prediction: B follows A, or the two are swapped
    none = auto()  # one segment of full sentences


class SentenceRules(StrEnum):
    rules = auto()  # data_prep/text/sentences.py
    lines = auto()
    pysbd = auto()
    auto = "auto"  # lines or rules, as a sample of each source shows (data_prep/text/layout.py)


class MaskingStrategy(StrEnum):
    token = auto()
    whole_word = auto()
    span = auto()


class TokenizerKind(StrEnum):
    wordpiece = auto()  # BERT's
    bpe = auto()  # of bytes: RoBERTa's and ModernBERT's
    unigram = auto()  # SentencePiece's: XLM-R's


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    strategy: MaskingStrategy = doc("what is masked together: token, whole_word or span (of whole words)")
    probability: float = doc("share of a sample's tokens to predict")
    max_predictions: int | None = doc("most predictions per sample; null follows probability and max_len")
    baked_draws: int = doc("mask draws stored in the shards")
    chinese_words: bool = doc("whole_word and span: find words of Chinese with jieba (else every character is one)")

    def __post_init__(self) -> None:
        require(0 < self.probability < 1, f"masking.probability={self.probability}: must be between 0 and 1")
        require(
            self.max_predictions is None or self.max_predictions >= 1,
            f"masking.max_predictions={self.max_predictions}: must be at least 1, or null",
        )
        require(0 <= self.baked_draws <= 64, f"masking.baked_draws={self.baked_draws}: must be 0 to 64 (1 is plenty)")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str | None = doc(
        "directory with a tokenizer.json or vocab.txt, or such a file; null trains one on this corpus"
    )
    kind: TokenizerKind = doc("to train: wordpiece (BERT's), bpe (of bytes, RoBERTa's) or unigram (XLM-R's)")
    vocab_size: int = doc("tokens of the vocabulary to train")
    lowercase: bool = doc("lower-case; for training WordPiece and for a bare vocab.txt")
    strip_accents: bool | None = doc(
        "take accents off; null = where it lower-cases, unless the script needs its marks; as lowercase"
    )
    chinese_characters: bool = doc("every ideograph is a word of its own; as lowercase")
    min_frequency: int = doc("training: how often two pieces must stand side by side to be joined (not unigram)")
    limit_alphabet: int | None = doc(
        "training WordPiece: most characters in the vocabulary; null = three quarters of it"
    )
    sample_mib: int = doc("MiB of text to train on")

    def __post_init__(self) -> None:
        require(
            64 <= self.vocab_size <= 2**24, f"tokenizer.vocab_size={self.vocab_size}: must be from 64 to 16,777,216"
        )
        require(
            self.kind is not TokenizerKind.bpe or self.vocab_size >= _FEWEST_OF_BYTES,
            f"tokenizer.vocab_size={self.vocab_size}: kind=bpe has every byte, so at least {_FEWEST_OF_BYTES} tokens",
        )
        require(self.min_frequency >= 1, f"tokenizer.min_frequency={self.min_frequency}: must be at least 1")
        require(
            self.limit_alphabet is None or self.limit_alphabet >= 1,
            f"tokenizer.limit_alphabet={self.limit_alphabet}: must be at least 1, or null",
        )
        require(self.sample_mib >= 1, f"tokenizer.sample_mib={self.sample_mib}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    nfc: bool = doc("bring text into Unicode's composed form")
    scripts: list[str] = doc(f"keep documents written in these: {', '.join(SCRIPTS)}; [] keeps all")
    min_script_share: float = doc("share of the letters that must be of those scripts")
    max_symbols: float | None = doc("share of symbols and punctuation above which a document is dropped; null = any")
    max_repeated_lines: float | None = doc("share of lines that repeat another, above which one is dropped; null = any")
    near_duplicates: float | None = doc("likeness (Jaccard, of runs of 5 words) from which one is dropped; null = none")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.scripts) - set(SCRIPTS))
        require(not unknown, f"clean.scripts: no {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
        for name in ("min_script_share", "max_symbols", "max_repeated_lines", "near_duplicates"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"clean.{name}={value}: must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class DiagnosisConfig:
    refuse: list[str] = doc("findings whose warning ends the preparation: [unknown_tokens, random_next, …]")
    ignore: list[str] = doc("findings that are neither refused nor warned of")

    def __post_init__(self) -> None:
        from cloze.corpus.diagnosis import NAMES  # and with it numpy: not above, `--help` does not wait for it

        for key in ("refuse", "ignore"):
            unknown = sorted(set(getattr(self, key)) - set(NAMES))
            require(not unknown, f"diagnosis.{key}: no {', '.join(unknown)}; there are {', '.join(NAMES)}")


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig(Variant):
    workers: int | None = doc("processes; null = one per core (ray: one task per CPU of the cluster)")

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 1, f"executor.workers={self.workers}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LocalConfig(ExecutorConfig, kind="local"):
    """Processes of this machine."""


@dataclass(frozen=True, kw_only=True)
class ArrayConfig(ExecutorConfig, kind="array"):
    """This call's share of the tasks: one call of several, as in a Slurm array."""

    task_index: int | None = doc("number of this call, from 0; null = SLURM_ARRAY_TASK_ID")
    num_tasks: int | None = doc("how many calls there are; null = SLURM_ARRAY_TASK_COUNT")
    wait_seconds: float = doc("how long to wait for the shares of other calls before saying they are missing")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.task_index is not None and self.num_tasks is not None,
            "executor.task_index, executor.num_tasks: give both, or run inside a Slurm array",
        )
        assert self.task_index is not None
        assert self.num_tasks is not None
        require(
            0 <= self.task_index < self.num_tasks,
            f"executor.task_index={self.task_index}: must be from 0 to executor.num_tasks - 1 = {self.num_tasks - 1}",
        )


@dataclass(frozen=True, kw_only=True)
class RayConfig(ExecutorConfig, kind="ray"):
    """Tasks of a Ray cluster."""

    address: str | None = doc("of the cluster; null = the one this machine belongs to, else a local one")


@dataclass(frozen=True, kw_only=True)
class PrepConfig:
    renamed: ClassVar[dict[str, str]] = {"engine": "executor"}

    source: Source = doc("where documents come from")
    sources: list[Any] = doc("a mixture instead of source: [{kind: text, paths: [a.txt], weight: 2}, …]")
    val_sources: list[Any] = doc("texts of your own to evaluate on: [{kind: text, paths: [dev.txt], name: news}, …]")
    out: str = doc("directory of the finished corpus, or a URL that can be written: s3://bucket/corpus")
    work: str = doc("for an out that is a URL: local directory for the unfinished work, a folder for each out")
    clean: CleanConfig = doc("what is mended and what is dropped")
    sentences: SentenceRules = doc(
        "where they end: auto (as each source shows), rules (ours, fast), lines, or pysbd (slow)"
    )
    language: str = doc("pysbd: two letters of the language whose rules it takes")
    seed: int = doc("of pairs, masks and order")
    max_len: int = doc("tokens per sample, [CLS] and [SEP] counted in")
    objective: Objective = doc("nsp, sop or none")
    short_seq_prob: float = doc("share of documents paired with a shorter target length")
    passes: int = doc("pairings of the corpus, each with new randomness")
    val_fraction: float = doc("share of the documents held out")
    masking: MaskingConfig = doc("what the model must guess")
    tokenizer: TokenizerConfig = doc("to train or to use")
    bucket_mib: int = doc("MiB of text per bucket: bounds memory, and is about the size of a shard")
    diagnosis: DiagnosisConfig = doc("what a corpus must not be")
    preview: int = doc(
        "documents of each source to look at, instead of preparing: prints what to expect, writes nothing"
    )
    executor: ExecutorConfig = doc("where tasks run")

    def __post_init__(self) -> None:
        require(self.out.strip() != "", "out: empty; name the directory of the finished corpus")
        require(0 <= self.seed < 2**63, f"seed={self.seed}: must be from 0 to 2^63 - 1")
        require(8 <= self.max_len <= 0xFFFF, f"max_len={self.max_len}: must be from 8 to 65,535 tokens")
        require(0 <= self.short_seq_prob <= 1, f"short_seq_prob={self.short_seq_prob}: must be in [0, 1]")
        require(1 <= self.passes <= 1000, f"passes={self.passes}: must be from 1 to 1,000")
        require(0 <= self.val_fraction < 1, f"val_fraction={self.val_fraction}: must be at least 0 and below 1")
        require(self.preview >= 0, f"preview={self.preview}: cannot be negative")
        require(1 <= self.bucket_mib <= 4096, f"bucket_mib={self.bucket_mib}: must be from 1 to 4,096")

    @property
    def max_predictions(self) -> int:
        """`masking.max_predictions`, or what probability and max_len ask for, rounded up to a multiple of 4."""
        if self.masking.max_predictions is not None:
            return self.masking.max_predictions
        return 4 * math.ceil(self.masking.probability * self.max_len / 4)
