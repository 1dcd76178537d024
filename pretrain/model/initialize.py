"""`init_from=`: a new run from the weights of an earlier one, or of an encoder that somebody published.

Weights only: step 0, a fresh optimizer and the run's own schedule. So phase 2 at 512 follows phase 1 at 128, and a
published encoder is pretrained further on a corpus prepared with its tokenizer, or with one that has words added.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer
from cloze.errors import UserError
from pretrain import checkpoint
from pretrain.config import Architecture, MorePositions
from pretrain.model.architectures import blueprint_of
from pretrain.model.bert import PackedBert
from pretrain.model.published import Published, read_published
from pretrain.model.saved import saved_model
from pretrain.model.vocabulary import Rows, extended_rows, rows_by_text, same_rows


class _Given(NamedTuple):
    """What is gone on from."""

    weights: Mapping[str, Tensor]
    described: Mapping[str, Any]  # the keys of `model` that it needs
    offset: int  # of its positions
    tokenizer: CorpusTokenizer | None  # None: the corpus' own


def initialize(
    module: PackedBert,
    source: str,
    facts: TokenizerFacts,
    tokenizer: Path,
    allow: Collection[str] = (),
    positions: MorePositions = MorePositions.fresh,
) -> str:
    """Fill `module` from `source` (run, checkpoint, Hugging Face directory or hub name); say what was done.

    `tokenizer` is the directory of the corpus' own. Rows of the vocabulary are matched by id, padding rows apart, where
    it is the source's; words that were added to that begin as the mean of their old pieces; of another tokenizer, if
    `allow` says `tokenizer`, rows are matched by the tokens' text. Position embeddings beyond the source's are made as
    `positions` says, and those beyond the model's left out; heads that the source has not keep their fresh values.
    Raises `UserError` where the tokenizer, the model (but for the thetas of rotary positions, if `allow` says
    `rope_theta`), a name or any other shape differs.
    """
    found = checkpoint.named_by("init_from", source)
    given = _of_run(source, found, module, facts) if found else _of_published(read_published(source), facts)
    _refuse_other_model(source, given.described, module, allow)
    rows = same_rows(facts)
    if given.tokenizer:
        rows = _rows(source, given.tokenizer, load_tokenizer(tokenizer), by_text="tokenizer" in allow)
    notes = [f"weights from {source}", *_refuse_other_names(source, given.weights.keys(), module)]
    notes += [rows.told] if rows.told else []
    blueprint = module.blueprint
    of_words = blueprint.vocabulary_rows(module.hf)
    for name, parameter in module.hf.named_parameters():
        theirs, target = given.weights.get(name), parameter.data
        if theirs is None:  # of a new head
            continue
        any_length = name in of_words or name == blueprint.positions
        same_shape = theirs.ndim == target.ndim and theirs.shape[any_length:] == target.shape[any_length:]
        if not same_shape or not theirs.is_floating_point():
            raise UserError(
                f"init_from={source}: its {name} is {list(theirs.shape)} of {theirs.dtype}, this model's "
                f"{list(target.shape)}; choose the model options of the source"
            )
        if name in of_words:
            if len(theirs) <= rows.most:
                raise UserError(
                    f"init_from={source}: its {name} has {len(theirs):,} rows, its tokenizer ids up to {rows.most:,}; "
                    "name an encoder with its own tokenizer"
                )
            rows.fill(target, theirs)
        elif name == blueprint.positions:
            notes += _place(theirs[given.offset :], target[blueprint.offset(module.hf) :], positions)
        else:
            target.copy_(theirs)
    return ", ".join(notes)


def _place(theirs_SxC: Tensor, target_PxC: Tensor, positions: MorePositions) -> list[str]:
    """Fill a table of P positions from one of S, and say so where they differ.

    Repeated as Beltagy et al. 2020 (Longformer, section 5) do it; interpolated along straight lines, ends on ends.
    """
    theirs, size = len(theirs_SxC), len(target_PxC)
    if theirs >= size or positions is MorePositions.fresh or not theirs:
        shared = min(theirs, size)
        target_PxC[:shared] = theirs_SxC[:shared]
        return [f"{shared} of {size} positions from it"] if theirs != size else []
    if positions is MorePositions.repeated:
        target_PxC.copy_(theirs_SxC[torch.arange(size) % theirs])
    else:
        table_1xCxS = theirs_SxC.to(target_PxC.dtype).T[None]
        target_PxC.copy_(F.interpolate(table_1xCxS, size, mode="linear", align_corners=True)[0].T)
    return [f"its {theirs} positions {positions.value} to {size}"]


def _rows(source: str, theirs: CorpusTokenizer, ours: CorpusTokenizer, *, by_text: bool) -> Rows:
    """Which of its rows become which of ours, where the tokenizers differ."""
    if found := extended_rows(theirs, ours):
        return found
    if by_text:
        return rows_by_text(theirs, ours)
    raise UserError(
        f"init_from={source}: its tokenizer is {theirs.facts.fingerprint[:12]}…, the corpus was prepared with "
        f"{ours.facts.fingerprint[:12]}…: ids would mean other words; prepare with tokenizer.path={source}, or add "
        "init_allow=[tokenizer]: tokens of the same text keep their embeddings, the others start afresh"
    )


def _of_run(source: str, found: Path, module: PackedBert, facts: TokenizerFacts) -> _Given:
    """Of a checkpoint that was copied alone there is no tokenizer, and none is needed where it is ours."""
    snapshot = checkpoint.load(found)
    model = saved_model(snapshot.config_yaml)
    blueprint = blueprint_of(model.architecture)
    described = blueprint.describe(blueprint.config(model, facts, module.vocab_rows))
    is_ours = snapshot.state.identity.tokenizer == facts.fingerprint
    theirs = None if is_ours else load_tokenizer(found.parent.parent / "tokenizer")
    offset = blueprint.position_offset((theirs.facts if theirs else facts).pad_id)
    return _Given(snapshot.weights, described, offset, theirs)


def _of_published(source: Published, facts: TokenizerFacts) -> _Given:
    theirs = source.tokenizer()
    is_ours = theirs.facts.fingerprint == facts.fingerprint
    return _Given(source.weights, source.described(), source.offset, None if is_ours else theirs)


def _refuse_other_model(source: str, theirs: Mapping[str, Any], module: PackedBert, allow: Collection[str]) -> None:
    """Raises `UserError` where the weights would be another function here, with the overrides that make it the same."""
    ours = module.blueprint.describe(module.hf.config)
    needed = [f"model.{key}={theirs[key]}" for key in theirs if key != "extra" and theirs[key] != ours[key]]
    extra, own = (blueprint_of(Architecture(one["architecture"])).unlike_published(one) for one in (theirs, ours))
    if "rope_theta" in allow:
        fixed = {key: value for key, value in extra.items() if not key.endswith("rope_theta")}
        extra = fixed | {key: value for key, value in own.items() if key.endswith("rope_theta")}
    if extra != own:
        pairs = (f"{key}:{value if isinstance(value, str) else json.dumps(value)}" for key, value in extra.items())
        needed.append(f"'model.extra={{{','.join(pairs)}}}'" if extra else "model.extra=null")
    if needed:
        raise UserError(f"init_from={source}: is another model than this run's; add {' '.join(needed)}")


def _refuse_other_names(source: str, theirs: Collection[str], module: PackedBert) -> list[str]:
    """What is new, and what is left out: whole heads. Raises `UserError` where any other name is missing or unknown."""
    own, heads = {name for name, _ in module.hf.named_parameters()}, module.blueprint.heads
    body = f"{module.hf.base_model_prefix}."

    def head_of(name: str) -> str:
        """One of ours, or one that we have not; nothing where it is of the encoder itself."""
        if known := [head for head in heads if name.startswith(f"{head}.")]:
            return known[0]
        if name.startswith(body):
            return f"{body}pooler" if name.startswith(f"{body}pooler.") else ""
        return name.partition(".")[0]

    absent = {head for head in heads if not any(head_of(name) == head for name in theirs)}
    missing = sorted(name for name in own - {*theirs} if head_of(name) not in absent)
    other = sorted(name for name in {*theirs} - own if head_of(name) in {"", *heads})
    if missing or other:
        told = [f"it has {kind} {_first(names)}" for kind, names in (("no", missing), ("a", other)) if names]
        raise UserError(
            f"init_from={source}: its names are not those of {module.blueprint.architecture.value}: "
            f"{', but '.join(told)}; name another encoder"
        )
    left = sorted({head_of(name) for name in theirs} - {"", *heads})
    new = [head for head in heads if head in absent]
    return [*(f"new: {head}, which it has not" for head in new), *(f"without its {head}" for head in left)]


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" (and {len(names) - 1:,} more)" if len(names) > 1 else "")
