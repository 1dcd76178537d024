"""What `python -m pretrain.grammar` does: a model's minimal pairs and pseudo-perplexities, as JSON and as lines."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from cloze.corpus.kinds.base import kind_of
from cloze.corpus.manifest import Manifest, read_manifest
from cloze.corpus.tokenizer import load_tokenizer
from cloze.errors import UserError
from cloze.log import log
from pretrain.config import Attention
from pretrain.evaluate import held_out_text, minimal_pairs
from pretrain.evaluate.config import GrammarConfig
from pretrain.evaluate.frequencies import log_likelihoods, token_counts
from pretrain.evaluate.pair_files import read_paradigms
from pretrain.evaluate.pll import I64, Encoded, Metric, Scorer
from pretrain.evaluate.results import FREQUENCIES, GRAMMAR
from pretrain.export.hugging_face import be_quiet, load_packed

_ROW_TOKENS = {"cpu": 4_096, "cuda": 65_536}  # run together


class CountedCorpus(NamedTuple):
    """A corpus of the model's own tokenizer."""

    directory: Path
    manifest: Manifest
    counts_V: I64


class Result(NamedTuple):
    """For machines, and for people."""

    body: dict[str, Any]
    lines: list[str]


def score(config: GrammarConfig) -> Result:
    """Everything that `config` asks for. Raises `UserError` where a file or the model cannot be used."""
    be_quiet()
    pairs = read_paradigms(config.data, most=config.pairs, bad_first=config.bad_first)  # what is quick to refuse, first
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, tokenizer = load_packed(Path(config.model), Attention.sdpa)
    module.to(device)
    scorer = Scorer(
        logits_of=lambda batch: module(batch)[0],
        mask_id=tokenizer.mask_token_id,
        max_positions=module.max_positions,
        row_tokens=_ROW_TOKENS[device.type],
        device=device,
    )
    corpus = _counted_corpus(config, tokenizer)
    body: dict[str, Any] = {"format": GRAMMAR, "model": config.model}
    body["corpus"] = str(corpus.directory) if corpus else None
    lines: list[str] = []
    if pairs:
        encoded = minimal_pairs.encode_pairs(pairs, tokenizer.backend_tokenizer, scorer.max_positions)
        body["data"] = config.data
        body["minimal_pairs"], lines = _score_pairs(encoded, scorer, tokenizer.unk_token_id, corpus)
    texts = _texts(config, scorer, tokenizer, corpus)
    if texts:
        rows = {name: _score_texts(those, scorer, corpus) for name, those in texts.items()}
        body["pseudo_perplexity"] = {
            name: {label: one._asdict() for label, one in found.items()} for name, found in rows.items()
        }
        lines += [*([""] if lines else []), *held_out_text.table(rows)]
    return Result(body, lines)


def _counted_corpus(config: GrammarConfig, tokenizer: Any) -> CountedCorpus | None:
    """The corpus that is named, or that the run was trained on if it is still there."""
    directory = Path(config.corpus) if config.corpus else _corpus_of_run(Path(config.model))
    if directory is None:
        log.warning("corpus: none is known, so word frequencies stand beside nothing; add corpus=DIR")
        return None
    manifest = read_manifest(directory)
    own = load_tokenizer(directory / "tokenizer").backend
    if own.get_vocab(with_added_tokens=True) != tokenizer.get_vocab():
        raise UserError(
            f"corpus={directory}: was prepared with another tokenizer than that of model={config.model}, so its "
            "counts are of other tokens; name the corpus that the model was trained on"
        )
    return CountedCorpus(directory, manifest, token_counts(directory, manifest))


def _corpus_of_run(model: Path) -> Path | None:
    for folder in (model, *model.parents[:2]):  # a checkpoint lies in RUN/checkpoints
        if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
            data = (yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}).get("data", {})
            directory = Path(str(data.get("path")))
            return directory if (directory / "manifest.json").is_file() else None
    return None


def _score_pairs(
    pairs: minimal_pairs.PairSet, scorer: Scorer, unk_id: int, corpus: CountedCorpus | None
) -> tuple[dict[str, Any], list[str]]:
    started = time.perf_counter()
    scores = minimal_pairs.score_pairs(pairs, scorer, list(Metric))
    seconds = time.perf_counter() - started
    frequencies = minimal_pairs.frequency_scores(pairs, corpus.counts_V) if corpus else None
    found = minimal_pairs.summary(pairs, minimal_pairs.columns_of(pairs, scores, frequencies))
    ties, unknown = int(pairs.same_P.sum()), pairs.unknown_share(unk_id)
    body: dict[str, Any] = {"seconds": seconds, "same_to_the_tokenizer": ties, "unknown_tokens": unknown}
    for kind, rows in found.items():
        body[kind] = {name: {key: _plain(value) for key, value in row.items()} for name, row in rows.items()}
    lines = minimal_pairs.table(found, list(Metric))
    lines.append(f"{len(pairs.encoded):,} pairs in {seconds:.1f} s; {unknown:.2%} of their tokens are [UNK]")
    if ties:
        lines.append(f"{ties:,} pairs are the same to the tokenizer, and tie")
    return body, lines


def _plain(value: Any) -> Any:
    return value._asdict() if isinstance(value, minimal_pairs.Estimate) else value


def _texts(
    config: GrammarConfig, scorer: Scorer, tokenizer: Any, corpus: CountedCorpus | None
) -> dict[str, list[Encoded]]:
    """Held-out texts, by what they are called."""
    found, backend = {}, tokenizer.backend_tokenizer
    for file in config.text:
        found[file] = held_out_text.lines_of(file, backend, most=config.texts, max_positions=scorer.max_positions)
    if config.split:
        if corpus is None:
            raise UserError(f"split={config.split}: of which corpus? add corpus=DIR")
        names = tokenizer.convert_ids_to_tokens(range(corpus.manifest.tokenizer.vocab_size))
        kind = kind_of(type(backend.model).__name__, f"model={config.model}")
        continues_V = np.asarray([not kind.begins_word(name or "") for name in names])
        continues_V[[*corpus.manifest.tokenizer.special_ids]] = False
        samples = held_out_text.samples_of(
            corpus.directory, corpus.manifest, config.split, continues_V=continues_V, most=config.texts
        )
        found[f"{corpus.directory} {config.split}"] = samples
    return found


def _score_texts(
    texts: Sequence[Encoded], scorer: Scorer, corpus: CountedCorpus | None
) -> dict[str, held_out_text.Perplexity]:
    scores = scorer.score([[text] for text in texts], list(Metric))
    found = {metric.value: scores[:, number] for number, metric in enumerate(Metric)}
    if corpus:
        found[FREQUENCIES] = log_likelihoods(corpus.counts_V, texts)
    return {label: held_out_text.perplexity(texts, scores_N) for label, scores_N in found.items()}
