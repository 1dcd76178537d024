"""The look at each layer: norms by hand, entropies against Hugging Face's own attention weights."""

import math

import pytest
import torch
from torch import nn

from cloze import cli
from cloze.errors import UserError
from pretrain.config import Attention, TrainConfig
from pretrain.data.dataset import padded as padded_inputs
from pretrain.engine.layers import LayerWatch, layer_of
from pretrain.evaluate.attention_entropy import attention_entropy
from pretrain.model.attention import PACKED_ATTENTION, AttentionInterface, packed_attention
from tests.unit.test_model import make_batch, packed, small


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.embeddings.word_embeddings.weight", "embeddings"),
        ("bert.encoder.layer.11.attention.self.query.weight", "11"),
        ("model.layers.3.mlp.Wo.weight", "3"),
        ("cls.predictions.bias", "heads"),
        ("bert.pooler.dense.weight", "heads"),
    ],
)
def test_layers_by_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_norms_of_a_step_of_plain_descent() -> None:
    """Its update is the rate times the gradient, whatever is clipped after us; an unwatched step leaves nothing."""
    first, second = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    optimizer = torch.optim.SGD([first, second], lr=0.5)
    watch = LayerWatch(optimizer, [("a.layer.0.x", first), ("a.layer.1.y", second)])

    def clip(*_: object) -> None:  # as the engine's guard does
        assert first.grad is not None
        first.grad.mul_(0.1)

    optimizer.register_step_pre_hook(clip)
    for watched in (False, True):
        first.grad, second.grad = torch.tensor([6.0, 8.0]), torch.full((2, 2), 2.0)
        weights = float(first.detach().norm())
        if watched:
            watch.watch(loss_scale=2.0)
        optimizer.step()
        found = watch.read()
        assert bool(found) == watched
    assert found["layers/0/grad_norm"] == pytest.approx(5.0)
    assert found["layers/0/update_ratio"] == pytest.approx(0.5 * 1.0 / weights)
    assert found["layers/1/grad_norm"] == pytest.approx(2.0)
    assert watch.read() == {}


def test_entropy_is_that_of_hugging_faces_attention() -> None:
    model, batch = packed(small(attention=Attention.cpu)).eval(), make_batch(3, 5)
    found = attention_entropy(batch, model)
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention
    inputs = padded_inputs(batch._replace(num_masked=len(batch.masked_index_M)))
    model.hf.set_attn_implementation("eager")
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        weights = model.hf.bert(**{name: inputs[name] for name in names}, output_attentions=True).attentions
    real_NxL = inputs["attention_mask"].bool()
    for layer, weights_NxHxLxL in enumerate(weights):
        entropy_NxHxL = torch.special.entr(weights_NxHxLxL).sum(-1)
        expected = float(entropy_NxHxL.transpose(1, 2)[real_NxL].mean())
        assert found[f"layers/{layer}/attention_entropy"] == pytest.approx(expected, abs=1e-5)
        assert 0 < expected < math.log(40)
    assert len(found) == len(weights) == 2


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("zero=1", "log.layers_every=5: with zero=1 no rank has a layer's whole gradient; set zero=0"),
        ("compile=true", "log.layers_every=5: not with compile=true, whose code hides the scores of attention"),
    ],
)
def test_what_cannot_be_watched(given: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.compose("train", TrainConfig, ["run=r", "data.path=d", "log.layers_every=5", "zero=0", given])
    assert str(caught.value).startswith(line)
