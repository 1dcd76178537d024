"""Directories in Hugging Face's format: a checkpoint is exported as one, and each is loaded and written in one way.

Names in checkpoints are Hugging Face's already; the padded vocabulary rows go, the tokenizer comes along. The written
directory is loaded again by Hugging Face's auto class, and its padded forward must give the packed trainer's logits. A
model card is written beside it (card.py).
"""

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from cloze import ownership
from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.masking import Masks
from cloze.corpus.shards import Samples
from cloze.corpus.tokenizer import load_tokenizer as load_word_piece
from cloze.errors import DiskError, UserError
from cloze.log import log
from pretrain import checkpoint
from pretrain.config import Attention, ModelConfig
from pretrain.data.loader import pack
from pretrain.export.card import write_card
from pretrain.export.card_facts import Options, Trained
from pretrain.model.architectures import blueprint_of, by_model_type
from pretrain.model.bert import PackedBert
from pretrain.model.saved import saved_model

TOLERANCE = 1e-4  # largest difference of two fp32 logits; the two forwards add in different orders
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
_OTHER_TOKENIZERS = ("vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")  # of older directories
_PAIR_HEAD = ("cls.seq_relationship.", "bert.pooler.")  # what many a published masked-LM has not
_PARITY_TEXTS = (
    ("The model reads both sides of a missing word.", "It was trained to guess what belongs there."),
    ("A short one.", "Returns the number of items in the list, or raises an error when the list is empty."),
    ("Numbers such as 1984 or 3.14, and names such as Ada Lovelace, are cut into pieces.", "Yes."),
)


def be_quiet() -> None:
    """Neither transformers nor deepspeed, which it imports, tells of itself."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def refuse_occupied(out: Path, key: str = "", *, force: bool | None = None) -> None:
    """Raises `UserError` where `out` is a file or below one, or holds anything: with `force`, but an export.

    Nor can a directory be put in the place of a link.
    """
    if out.is_symlink():
        raise UserError(f"{key}{out}: is a link; name the directory itself, {out.resolve()}, or another one")
    at = next(path for path in (out, *out.parents) if path.exists())
    if not at.is_dir():
        raise UserError(f"{key}{out}: {at} is a file; name another directory")
    if at == out and any(out.iterdir()):
        if force:
            ownership.require_own(out, ownership.EXPORT, key)
        else:
            or_force = "" if force is None else ", or add --force to replace it"
            raise UserError(f"{key}{out}: not empty; name another directory{or_force}")


def refuse_within(out: Path, source: Path) -> None:
    """Raises `UserError` where `out` is, or is in, a run or a corpus, or `source` is in it."""
    here, there = out.resolve(), source.resolve()
    if here in (there, *there.parents):
        raise UserError(f"{out}: holds {source}, which is to be exported; name another directory")
    for path in (here, *here.parents):
        for kind in (ownership.RUN, ownership.CORPUS):
            if ownership.is_of(path, kind):
                raise UserError(f"{out}: {path} is {kind.told}; name a directory outside it")


@contextmanager
def replaced_directory(out: Path, key: str = "", *, force: bool | None = None) -> Iterator[Path]:
    """A temporary directory that becomes `out`, or on an error nothing. Raises as `refuse_occupied` does."""
    temporary, made = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp"), False
    try:
        refuse_occupied(out, key, force=force)
        temporary.mkdir(parents=True)
        made = True
        yield temporary
        refuse_occupied(out, key, force=force)
        if out.is_dir() and any(out.iterdir()):
            ownership.remove_own(out, ownership.EXPORT, key)
        temporary.rename(out)  # over an empty directory, too
    except OSError as error:
        raise DiskError(f"{key}{out}: {error}; free space and run the same command again") from error
    finally:
        if made:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def loading(folder: Path, key: str = "model") -> Iterator[None]:
    """Whatever is wrong with the files of `folder` becomes a `UserError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}={folder}: cannot be loaded ({first}); export it again") from error


def load_tokenizer(folder: Path, key: str = "model", *, split_into_words: bool = False) -> Any:
    """Raises `UserError` where the directory holds no model with its tokenizer.

    `split_into_words`: for words of their own, as if a blank stood before each.
    """
    if not (folder / "config.json").is_file():
        there = ownership.told(folder)
        if there in (ownership.RUN.told, ownership.CHECKPOINT.told):
            command = shlex.join(("python", "-m", "pretrain.export", str(folder), f"out/{folder.resolve().name}"))
            raise UserError(f"{key}={folder}: is {there}, not yet a model; make one: {command}")
        fault = f"is {there}, no model" if there else "no config.json there"
        raise UserError(f"{key}={folder}: {fault}; name a directory made by `python -m pretrain.export`")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES + _OTHER_TOKENIZERS):
        raise UserError(f"{key}={folder}: has no tokenizer ({' or '.join(_TOKENIZER_FILES)}); export the model again")
    with loading(folder, key):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if split_into_words and "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer):
            return AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
        return tokenizer


def load_pretrained(auto_class: Any, folder: Path, key: str = "model", *, purpose: str = "", **options: Any) -> Any:
    """The model in fp32. For a `purpose` it must have all its weights: missing ones would be random.

    A bare encoder may lack its pooler, which nothing here reads.
    """
    with loading(folder, key):
        model, told = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    if purpose and (missing := sorted(key for key in told["missing_keys"] if not key.startswith("pooler."))):
        raise UserError(f"{key}={folder}: has no {missing[0]}, as {purpose} needs; name another model")
    return model.eval()


def export(run: Path, out: Path, *, force: bool = False, average: int = 1) -> float:
    """Write `out` from the newest verified checkpoint of `run` (or from `run` if it is a checkpoint).

    Its weights are the mean of `average` checkpoints, of which that is the last (checkpoint/average.py). Returns the
    largest difference between the trainer's and the exported model's logits. Where `out` is that model already, nothing
    is written: what was put into its card since is kept. Raises `UserError` when there is no checkpoint, or there are
    not so many, `out` is in the way, or the logits differ by more than `TOLERANCE`.
    """
    source, tokenizer = _locate(run)
    refuse_within(out, tokenizer.parent)
    snapshot, averaged = checkpoint.load(source), checkpoint.latest(source, average, log.warning)
    if average > 1:
        snapshot = snapshot._replace(weights=checkpoint.mean_weights(averaged))
    model = saved_model(snapshot.config_yaml)
    facts = load_word_piece(tokenizer).facts
    trained = PackedBert(model, facts, max_len=model.max_positions)
    trained.load_weights(snapshot.weights)
    if not force:
        with suppress(UserError):  # no model
            if (difference := parity(trained, out)) <= TOLERANCE:
                return difference
    with replaced_directory(out, force=force) as temporary:
        _plain_model(model, facts, snapshot.weights).save_pretrained(temporary)
        _save_tokenizer(tokenizer, trained, temporary)
        (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode)  # safetensors' own is 0600
        difference = parity(trained, temporary)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{out}: its logits differ from the trainer's by {difference:.2g}, more than {TOLERANCE:g}; "
                "nothing was exported. Please report this with your versions"
            )
        state = snapshot.state
        then = Trained(
            step=state.step,
            samples=state.samples,
            tokens=state.tokens,
            corpus_sha256=state.identity.data,
            averaged_steps=[checkpoint.step_of(path) for path in averaged] if average > 1 else [],
        )
        config = yaml.safe_load(snapshot.config_yaml)
        write_card(temporary, tokenizer.parent, then, config, Options(name=out.name))
        ownership.mark(temporary, ownership.EXPORT, **then.facts)
    return difference


def load_hugging_face(run: Path | str) -> PreTrainedModel:
    """Hugging Face's model, in fp32 and ready to predict, with the weights of the newest verified checkpoint of `run`.

    `run` may be one checkpoint of a run, too. Raises `UserError` where there is none.
    """
    source, tokenizer = _locate(Path(run))
    snapshot = checkpoint.load(source)
    facts = load_word_piece(tokenizer).facts
    return _plain_model(saved_model(snapshot.config_yaml), facts, snapshot.weights).eval()


def load_packed(source: Path, kernel: Attention) -> tuple[PackedBert, Any]:
    """(the trainer's module in fp32, ready to predict; its tokenizer) of a run, a checkpoint or a model's directory.

    Raises `UserError` where there is none, where it is of no architecture here, or lacks its masked-LM head.
    """
    if not (source / "config.json").is_file():
        _, folder = _locate(source)
        with loading(folder):
            return PackedBert.of(load_hugging_face(source), kernel).eval(), AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(source)
    with loading(source):
        kind = AutoConfig.from_pretrained(source).model_type
    if kind not in by_model_type():
        raise UserError(f"model={source}: its model_type is {kind}; there are {', '.join(by_model_type())}")
    with loading(source):
        auto_class = by_model_type()[kind].auto_class
        model, told = auto_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(name for name in told["missing_keys"] if not name.startswith(_PAIR_HEAD)):
        raise UserError(f"model={source}: has no {missing[0]}, as predicting words needs; name another model")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"model={source}: its tokenizer has {len(tokenizer)} tokens, it {model.config.vocab_size}")
    return PackedBert.of(model, kernel).eval(), tokenizer


def parity(trained: PackedBert, exported: Path) -> float:
    """Largest difference of MLM (every position) and NSP logits on a few pairs: packed against loaded and padded."""
    tokenizer = load_tokenizer(exported)
    model = load_pretrained(trained.blueprint.auto_class, exported)
    encoded = tokenizer(
        [a for a, _ in _PARITY_TEXTS],
        [b for _, b in _PARITY_TEXTS],
        padding=True,
        truncation=True,
        max_length=trained.max_positions,
        return_tensors="pt",
    )
    rows = [row[mask.bool()] for row, mask in zip(encoded.input_ids, encoded.attention_mask, strict=True)]
    batch = pack([_every_position(rows, tokenizer.sep_token_id)])
    if "token_type_ids" not in encoded:  # such a tokenizer's corpora have none either
        batch = batch._replace(token_type_ids_T=torch.zeros_like(batch.token_type_ids_T))
    trained.eval()
    with torch.no_grad():
        mlm, nsp = trained(batch)
        theirs = model(**encoded)
    their_mlm = theirs.prediction_logits if trained.has_pairs else theirs.logits
    difference = _difference(mlm, their_mlm[encoded.attention_mask.bool()])
    if trained.has_pairs:
        difference = max(difference, _difference(nsp, theirs.seq_relationship_logits))
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


def _save_tokenizer(folder: Path, trained: PackedBert, out: Path) -> None:
    """The run's; where the model takes no token types it says that it returns none, which transformers leaves out."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    if not trained.blueprint.takes_token_types:
        path = out / "tokenizer_config.json"
        told = json.loads(path.read_text(encoding="utf-8")) | {"model_input_names": ["input_ids", "attention_mask"]}
        path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain_model(config: ModelConfig, facts: TokenizerFacts, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Hugging Face's model with the real vocabulary only."""
    blueprint = blueprint_of(config.architecture)
    model = blueprint.build(config, facts, facts.vocab_size)
    padded = blueprint.vocabulary_rows(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            given = weights[blueprint.same_bias.get(name, name)]
            parameter.copy_(given[: facts.vocab_size] if name in padded else given)
    return model


def _locate(run: Path) -> tuple[Path, Path]:
    """(checkpoint, tokenizer) of a run directory or of one checkpoint in it."""
    if (run / "checkpoints").is_dir():
        found = checkpoint.newest_verified(run / "checkpoints", log.warning)
        if found is None:
            raise UserError(f"{run}: has no checkpoint that verifies; train first")
    elif faults := checkpoint.verify(run):
        there = f"is {told}, " if (told := ownership.told(run)) not in ("", ownership.CHECKPOINT.told) else ""
        why = "" if there or not run.exists() else f" ({faults[0]})"
        raise UserError(
            f"{run}: {there}neither a run directory nor a whole checkpoint{why}; python -m pretrain.runs lists the runs"
        )
    else:
        found = run
    tokenizer = found.parent.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise UserError(f"{tokenizer}: the run's tokenizer is missing; copy the corpus's there")
    return found, tokenizer
