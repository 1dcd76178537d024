"""Rotary positions turned otherwise, by theta or by a scaling: in place as when built so, and exported."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from cloze import cli
from cloze.errors import UserError
from pretrain.config import ModelConfig, TrainConfig
from pretrain.model.architectures import blueprint_of
from pretrain.model.bert import PackedBert
from tests.support import TINY, tokenizer_facts

FACTS = tokenizer_facts(99)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def model_of(extra: dict[str, Any] | None) -> ModelConfig:
    given = ("model.architecture=modernbert", "model.num_layers=4", "model.intermediate_size=48")
    config = cli.compose("train", TrainConfig, ["run=r", "data.path=d", *TINY, *given])
    return replace(config.model, extra=extra)


def angles(module: PackedBert) -> dict[str, Any]:
    rotary: Any = module.hf.base_model.rotary_emb
    scales = {name: getattr(rotary, name) for name in vars(rotary) if name.endswith("attention_scaling")}
    return {name: buffer.tolist() for name, buffer in rotary.named_buffers()} | scales


@pytest.mark.parametrize(
    "extra",
    [
        {"global_rope_theta": 10_000.0},
        {"global_rope_scaling": YARN},
        {"global_rope_scaling": LINEAR, "global_rope_theta": 10_000.0, "local_rope_theta": 500.0},
    ],
)
def test_turned_in_place_they_are_as_built_so_and_as_transformers_has_them(
    extra: dict[str, Any], tmp_path: Any
) -> None:
    """After a cast to bf16, too, which would cost radians: angles stay in fp32."""
    torch.manual_seed(1)
    plain, built = PackedBert(model_of(None), FACTS, max_len=40), PackedBert(model_of(extra), FACTS, max_len=40)
    assert angles(plain) != angles(built)
    plain.bfloat16()
    plain.set_rotary(model_of(extra))
    assert angles(plain) == angles(built)
    assert {buffer.dtype for buffer in plain.hf.base_model.rotary_emb.buffers()} == {torch.float32}
    built.set_rotary(model_of(None))
    assert angles(built) == angles(PackedBert(model_of(None), FACTS, max_len=40))

    plain.float()
    plain.set_rotary(model_of(extra))
    plain.hf.set_attn_implementation("eager")
    plain.hf.save_pretrained(tmp_path)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    reread: Any = theirs.base_model.rotary_emb
    assert {name: buffer.tolist() for name, buffer in reread.named_buffers()}.items() <= angles(plain).items()
    blueprint = blueprint_of(model_of(extra).architecture)
    assert blueprint.unlike_published(blueprint.describe(theirs.config)) == extra
    ids = torch.randint(5, 99, (1, 40))
    assert torch.equal(theirs(ids).logits, plain.hf.eval()(ids).logits)


@pytest.mark.parametrize(
    ("scaling", "line"),
    [
        ({"rope_type": "dynamic", "factor": 2}, "is no scaling by linear or yarn"),
        ("yarn", "is no scaling by linear or yarn"),
        ({"rope_type": "yarn", "factor": 2}, "yarn needs original_max_position_embeddings"),
    ],
)
def test_what_is_no_scaling(scaling: object, line: str) -> None:
    with pytest.raises(UserError, match=f"^model.extra: global_rope_scaling.*{line}"):
        PackedBert(model_of({"global_rope_scaling": scaling}), FACTS, max_len=40)
