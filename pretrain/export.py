"""`python -m pretrain.export runs/books out/books`: a checkpoint as a Hugging Face directory, proved before it is done.

Names are Hugging Face's already; the padded vocabulary rows go, the tokenizer comes along. The written directory is
loaded again by Hugging Face's auto class and its padded forward must give the packed trainer's logits. A model card is
written beside it (card.py).
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from data_prep import entry
from data_prep.errors import ExitCode, UserError
from data_prep.manifest import TokenizerFacts
from data_prep.masking import Masks
from data_prep.shards import Samples
from data_prep.tokenizer import load_tokenizer
from pretrain import card, checkpoint
from pretrain.config import ModelConfig, TrainConfig
from pretrain.loader import pack
from pretrain.model import VOCABULARY_ROWS, PackedBert, hugging_face_model

TOLERANCE = 1e-4  # largest difference of two fp32 logits; the two forwards add in different orders
_PARITY_TEXTS = (
    ("The model reads both sides of a missing word.", "It was trained to guess what belongs there."),
    ("A short one.", "Returns the number of items in the list, or raises an error when the list is empty."),
    ("Numbers such as 1984 or 3.14, and names such as Ada Lovelace, are cut into pieces.", "Yes."),
)


def export(run: Path, out: Path, *, force: bool = False) -> float:
    """Write `out` from the newest verified checkpoint of `run` (or from `run` if it is a checkpoint).

    Returns the largest difference between the trainer's and the exported model's logits. Raises `UserError` when
    there is no checkpoint, `out` is in the way, or the logits differ by more than `TOLERANCE`.
    """
    source, tokenizer = _locate(run)
    if out.exists() and not force and any(out.iterdir()):
        raise UserError(f"{out}: not empty; name another directory, or add --force to replace it")
    snapshot = checkpoint.load(source)
    model = _model_config(snapshot.config_yaml)
    facts = load_tokenizer(tokenizer).facts
    trained = PackedBert(model, facts, max_len=model.max_positions)
    trained.load_weights(snapshot.weights)

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _plain_model(model, facts, snapshot.weights).save_pretrained(temporary)
        _tokenizer(tokenizer, trained).save_pretrained(temporary)
        (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode)  # safetensors' own is 0600
        difference = parity(trained, temporary, facts)
        card.write_card(temporary, out.name, tokenizer.parent, snapshot.state, yaml.safe_load(snapshot.config_yaml))
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def parity(trained: PackedBert, exported: Path, facts: TokenizerFacts) -> float:
    """Largest difference of MLM (every position) and NSP logits on a few pairs: packed against loaded and padded."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    loader = AutoModelForPreTraining if trained.has_pairs else AutoModelForMaskedLM
    model = loader.from_pretrained(exported, dtype=torch.float32).eval()
    encoded = tokenizer(
        [a for a, _ in _PARITY_TEXTS],
        [b for _, b in _PARITY_TEXTS],
        padding=True,
        truncation=True,
        max_length=model.config.max_position_embeddings,
        return_tensors="pt",
    )
    rows = [row[mask.bool()] for row, mask in zip(encoded.input_ids, encoded.attention_mask, strict=True)]
    trained.eval()
    with torch.no_grad():
        mlm, nsp = trained(pack([_every_position(rows, facts.sep_id)]))
        theirs = model(**encoded)
    their_mlm = theirs.prediction_logits if trained.has_pairs else theirs.logits
    difference = _difference(mlm, their_mlm[encoded.attention_mask.bool()])
    if trained.has_pairs:
        difference = max(difference, _difference(nsp, theirs.seq_relationship_logits))
    if not difference <= TOLERANCE:
        raise UserError(
            f"{exported}: its logits differ from the trainer's by {difference:.2g}, more than {TOLERANCE:g}; "
            "nothing was exported. Please report this with your versions"
        )
    return difference


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max())


def _every_position(rows: Sequence[Tensor], sep_id: int) -> tuple[Samples, Masks]:
    """Samples whose every position is "masked" and shown unchanged: the packed forward then gives all logits."""
    tokens = [row.numpy().astype(np.uint32) for row in rows]
    lengths = np.asarray([[row.tolist().index(sep_id) + 1, len(row)] for row in rows], dtype=np.uint16)
    counts = lengths[:, 1].astype(np.uint16)
    joined = np.concatenate(tokens)
    positions = np.concatenate([np.arange(len(row), dtype=np.uint16) for row in tokens])
    ids = np.arange(len(rows), dtype=np.uint64)
    samples = Samples(joined, lengths, np.zeros(len(rows), np.uint8), ids, None)
    return samples, Masks(counts, positions, joined)


def _tokenizer(folder: Path, trained: PackedBert) -> Any:
    """The run's tokenizer; ModernBERT takes no token types, so it returns none."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not trained.has_pairs:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _plain_model(config: ModelConfig, facts: TokenizerFacts, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Hugging Face's model with the real vocabulary only."""
    model = hugging_face_model(config, facts, vocab_rows=facts.vocab_size)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            rows = weights[name][: facts.vocab_size] if name in VOCABULARY_ROWS else weights[name]
            parameter.copy_(rows)
    return model


def _model_config(config_yaml: str) -> ModelConfig:
    """The model of a saved configuration; keys that are newer than it keep today's defaults."""
    today = entry.compose("train", TrainConfig, ["run=any", "data.path=any"]).model
    return entry.typed({**asdict(today), **yaml.safe_load(config_yaml)["model"]}, ModelConfig)


def _locate(run: Path) -> tuple[Path, Path]:
    """(checkpoint, tokenizer) of a run directory or of one checkpoint in it."""
    if (run / "checkpoints").is_dir():
        found = checkpoint.newest_verified(run / "checkpoints", lambda text: print(f"warning: {text}", file=sys.stderr))
        if found is None:
            raise UserError(f"{run}: has no checkpoint that verifies; train first")
        return found, run / "tokenizer"
    if faults := checkpoint.verify(run):
        raise UserError(f"{run}: neither a run directory nor a whole checkpoint ({faults[0]})")
    return run, run.parent.parent / "tokenizer"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.export", description="Checkpoint -> Hugging Face.")
    parser.add_argument("run", type=Path, help="run directory, or one checkpoint of it")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--force", action="store_true", help="replace what stands at OUT")
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to the Hugging Face hub, too")
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which would warn
    try:
        difference = export(arguments.run, arguments.out, force=arguments.force)
        print(f"{arguments.out}: exported; logits equal the trainer's (largest difference {difference:.1e})")
        if arguments.push:
            print(f"pushed to {card.push(arguments.out, arguments.push, private=not arguments.public)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
