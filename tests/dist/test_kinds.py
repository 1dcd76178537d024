"""Corpora of tokenizers other than WordPiece: prepared, laid out as the tokenizer does it, and trained on."""

from pathlib import Path

import numpy as np
import pytest

from cloze.corpus import verify
from cloze.corpus.peek import peek
from cloze.corpus.reader import open_corpus
from data_prep.__main__ import main
from pretrain.data.loader import TrainingCorpus
from tests.support import Trainer
from tests.unit.corpora import documents, write_jsonl
from tests.unit.published import make


@pytest.mark.parametrize("objective", ["nsp", "none"])
@pytest.mark.parametrize("kind", ["bpe", "unigram", "modernbert"])
def test_a_corpus_is_prepared_and_trained_on(trainer: Trainer, tmp_path: Path, kind: str, objective: str) -> None:
    """Two are trained on the corpus and laid out as RoBERTa's, one is given."""
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(40)), tmp_path / "out"
    tokenizer = [f"tokenizer.kind={kind}", "tokenizer.vocab_size=512"]
    if kind == "modernbert":
        tokenizer = [f"tokenizer.path={make(kind, tmp_path / kind)}"]
    masking = "whole_word" if objective == "nsp" else "token"
    options = ["source=jsonl", f"source.paths=[{source}]", "executor.workers=1", "max_len=48", "val_fraction=0.1"]
    assert main([*options, *tokenizer, f"masking={masking}", f"objective={objective}", f"out={out}"]) == 0
    assert list(verify.faults(out)) == []

    corpus = open_corpus(out)
    facts, specials = corpus.manifest.tokenizer, corpus.tokenizer.specials
    is_roberta = kind != "modernbert"
    assert (facts.separators, facts.token_types) == ((2, False) if is_roberta else (1, False))
    for sample in list(corpus.epoch(0))[:20]:
        tokens = sample.tokens_T.tolist()
        separators = [i for i, token in enumerate(tokens) if token == facts.sep_id]
        assert tokens[0] == facts.cls_id
        assert separators[-1] == len(tokens) - 1
        assert len(separators) == (1 + facts.separators if objective == "nsp" else 1)
        assert separators[0] + facts.separators - 1 == separators[-2] if objective == "nsp" else True
        assert not {0, *separators} & {*sample.masked_positions_M.tolist()}
        assert not sample.segment_ids_T.any()
        shown = {*sample.masked_tokens_M.tolist()}
        assert not shown & ({facts.cls_id, facts.sep_id, facts.pad_id, *facts.never_drawn})
    batch = TrainingCorpus(out).training_batch(1, np.arange(4))
    assert not batch.token_type_ids_T.any()
    text = "\n".join(text.plain for text in peek(out, "pass-00", 5, 0))
    assert f"{specials.mask}{{" in text
    assert "\u0120" not in text

    result = trainer.run(f"data.path={out}", "steps=2", "eval.every=2")
    assert result.code == 0, result.stderr
    assert result.metrics[-1]["step"] == 2
