"""The packed forward against Hugging Face's padded `BertForPreTraining`: loss and every gradient, in fp32."""

import itertools
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from cloze.corpus.masking import Unmasked, draw_masks
from cloze.corpus.shards import Samples, sample_ids
from cloze.errors import UserError
from pretrain.config import Architecture, Attention, Init, LossConfig, ModelConfig, PositionInit, padded_vocab_size
from pretrain.data.loader import MicroBatch, bounded, pack
from pretrain.loop import seed_dropout
from pretrain.model import cpu_dropout, loss
from pretrain.model.architectures import blueprint_of
from pretrain.model.bert import PackedBert, sinusoids
from pretrain.model.loss import pretraining_loss
from pretrain.optim.optimizer import parameter_groups
from tests.support import PAD, default_masking, random_block, tokenizer_facts
from tests.unit import slow_flash  # noqa: F401 - makes varlen run on a CPU

VOCAB = 61
FACTS = tokenizer_facts(VOCAB)


def small(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "name": "test", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64,
        "max_positions": 40, "dropout": 0.0, "attention_dropout": 0.0, "pad_vocab_to": 64,
        "activation_checkpointing": False, "architecture": Architecture.bert, "attention": Attention.auto,
        "init": Init.fixed, "init_std": 0.02, "position_init": PositionInit.normal, "distance_bias": 0.0,
        "extra": None,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def packed(config: ModelConfig, seed: int = 0) -> PackedBert:
    """A model whose every parameter is random: fresh biases are 0 and would hide much."""
    torch.manual_seed(seed)
    model = PackedBert(config, FACTS, max_len=40)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_batch(seed: int, samples: int, max_len: int = 40, objective: str = "nsp") -> MicroBatch:
    block = random_block(random.Random(seed), samples=samples, max_len=max_len, vocab_size=VOCAB, objective=objective)
    ids = sample_ids(0, 0, samples)
    masking = default_masking(probability=0.25)
    masks = draw_masks(Unmasked(block.tokens_T, block.lengths_Nx2, ids), 0, masking, FACTS.mask_vocabulary)
    return pack([(Samples(*block[:3], ids, None), masks)])


def rows_of(batch: MicroBatch) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(batch.cu_seqlens.tolist())]


def padded(batch: MicroBatch) -> dict[str, Tensor]:
    """The batch as Hugging Face has it: a rectangle, an attention mask, labels of -100 where nothing is asked."""
    labels = torch.full_like(batch.input_ids_T, -100)
    labels[batch.masked_index_M] = batch.mlm_labels_M

    def rectangle(values: Tensor, filler: int) -> Tensor:
        rows = [values[row] for row in rows_of(batch)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

    return {
        "input_ids": rectangle(batch.input_ids_T, PAD),
        "token_type_ids": rectangle(batch.token_type_ids_T, 0),
        "attention_mask": rectangle(torch.ones_like(batch.input_ids_T), 0),
        "labels": rectangle(labels, -100),
        "next_sentence_label": batch.nsp_labels_N,
    }


def reference_of(model: PackedBert, config: ModelConfig) -> PreTrainedModel:
    """Hugging Face's own model and attention with the same weights, for the real vocabulary only."""
    reference = blueprint_of(config.architecture).build(config, FACTS, VOCAB)
    reference.set_attn_implementation("eager")
    weights = dict(model.hf.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(weights[name][: len(parameter)])
    return reference


def losses_of(model: PackedBert, batch: MicroBatch) -> Tensor:
    return pretraining_loss(
        model(batch),
        batch.mlm_labels_M,
        batch.nsp_labels_N,
        weights=LossConfig(mlm_weight=1.0, nsp_weight=1.0, z_loss_weight=0.0),
        masked=len(batch.mlm_labels_M),
        pairs=len(batch.nsp_labels_N) if model.has_pairs else 0,
    ).loss


def gradients(model: torch.nn.Module) -> Mapping[str, Tensor]:
    return {name.removeprefix("hf."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_loss_and_gradients_equal(config: ModelConfig, batch: MicroBatch, inputs: dict[str, Tensor]) -> None:
    """The packed model's against Hugging Face's own on the same samples, padded."""
    model = packed(config)
    reference = reference_of(model, config)
    model.train()
    reference.train()

    loss = losses_of(model, batch)
    loss.backward()
    expected = reference(**inputs).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)

    ours, theirs = gradients(model), gradients(reference)
    assert ours.keys() == theirs.keys() == {name for name, _ in reference.named_parameters()}
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        mine = ours[name]
        if name in model.blueprint.vocabulary_rows(model.hf):
            assert len(mine) == padded_vocab_size(VOCAB, config.pad_vocab_to)
            assert not mine[VOCAB:].any()  # a padded row learns nothing
            mine = mine[:VOCAB]
        torch.testing.assert_close(mine, gradient, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pad_vocab_to", [1, 64])
@pytest.mark.parametrize("samples", [1, 7])
def test_loss_and_every_gradient_equal_hugging_faces(samples: int, pad_vocab_to: int, checkpointing: bool) -> None:
    batch = make_batch(samples, samples)
    config = small(pad_vocab_to=pad_vocab_to, activation_checkpointing=checkpointing)
    assert_loss_and_gradients_equal(config, batch, padded(batch))


def modernbert(**changes: Any) -> ModelConfig:
    """Four layers, of which two see a window of 64 tokens to each side only."""
    return small(architecture=Architecture.modernbert, num_layers=4, max_positions=200, **changes)


def test_modernbert_equals_hugging_faces_beyond_its_window() -> None:
    batch = make_batch(5, 6, max_len=180, objective="none")
    assert batch.max_seqlen > 130
    inputs = padded(batch)
    del inputs["token_type_ids"], inputs["next_sentence_label"]
    assert_loss_and_gradients_equal(modernbert(), batch, inputs)


UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("extra", [None, {"layer_norm_eps": 0.1, "hidden_act": "relu"}])
@pytest.mark.parametrize("architecture", [Architecture.roberta, Architecture.xlm_roberta])
def test_roberta_equals_hugging_faces(
    architecture: Architecture, extra: dict[str, Any] | None, checkpointing: bool
) -> None:
    """Its positions are Hugging Face's, which counts them from the ids that are no padding."""
    config = small(architecture=architecture, activation_checkpointing=checkpointing, extra=extra)
    inputs = padded(make_batch(5, 6, objective="none"))
    del inputs["token_type_ids"], inputs["next_sentence_label"]
    assert_loss_and_gradients_equal(config, make_batch(5, 6, objective="none"), inputs)


@pytest.mark.parametrize("architecture", list(Architecture))
def test_a_head_with_weights_of_its_own_equals_hugging_faces(architecture: Architecture) -> None:
    """Not tied to the embeddings; Hugging Face's second bias, which it alone then reads, is the one in checkpoints."""
    config = small(architecture=architecture, extra=UNTIED)
    model, batch = packed(config).eval(), make_batch(5, 6, objective="none")
    names = {name for name, _ in model.hf.named_parameters()}
    assert model.blueprint.tied[0] in names
    assert not names & model.blueprint.same_bias.keys()
    inputs = padded(batch)
    del inputs["next_sentence_label"], inputs["labels"]
    if not model.blueprint.takes_token_types:
        del inputs["token_type_ids"]
    theirs = reference_of(model, config).eval()(**inputs)
    real = inputs["attention_mask"].bool()
    logits = (theirs.prediction_logits if model.has_pairs else theirs.logits)[real]
    torch.testing.assert_close(model(batch)[0], logits[batch.masked_index_M], atol=1e-5, rtol=1e-5)


def test_roberta_counts_positions_from_behind_the_padding() -> None:
    """[PAD] is 1, as in published ones: a table of 42 holds 40 tokens."""
    model = PackedBert(small(architecture=Architecture.roberta), replace(FACTS, pad_id=1, unk_id=0), max_len=40)
    assert model.hf.roberta.embeddings.position_embeddings.num_embeddings == 42
    assert model.max_positions == 40
    sines = small(architecture=Architecture.roberta, position_init=PositionInit.sinusoid)
    table = PackedBert(sines, replace(FACTS, pad_id=1, unk_id=0), max_len=40).hf.get_parameter(
        model.blueprint.positions
    )
    torch.testing.assert_close(table.detach()[2:], sinusoids(40, 32, size=sines.weights_std))


def test_extra_that_an_architecture_has_not_is_one_line() -> None:
    for extra, line in (
        ({"rope_theta": 1}, "^model.extra: bert has no rope_theta; there are hidden_act, "),
        ({"layer_norm_eps": "a"}, "^model.extra: no configuration of bert "),
    ):
        with pytest.raises(UserError, match=line) as caught:
            packed(small(extra=extra))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it, but not where warnings are errors
@pytest.mark.parametrize("kernel", [Attention.sdpa, Attention.varlen])
@pytest.mark.parametrize("architecture", [Architecture.bert, Architecture.modernbert])
def test_layers_are_compiled_once_for_training_and_once_for_evaluation(
    architecture: Architecture, kernel: Attention
) -> None:
    """Rows of one to three times 256 tokens, samples of 16 to 48: whole layers, none again after the first batch."""
    config, kinds = (small(), 2) if architecture is Architecture.bert else (modernbert(), 3)
    objective = "nsp" if architecture is Architecture.bert else "none"
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, plain = packed(config), packed(config)
    model.kernel = kernel
    model.compile_layers(backend="aot_eager")  # traces and differentiates as any backend, and needs no compiler
    graphs, shapes = [], set()
    for seed in range(3):
        batch = bounded(make_batch(seed, 24, max_len=8 + 16 * seed, objective=objective))
        shapes.add((len(batch.input_ids_T), batch.max_seqlen))
        loss = losses_of(model.train(), batch)
        loss.backward()
        torch.testing.assert_close(loss, losses_of(plain, batch))
        with torch.no_grad():
            torch.testing.assert_close(losses_of(model.eval(), batch), loss)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(shapes) == 3
    assert graphs == [2 * kinds] * 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_recomputes_every_layer_once(checkpointing: bool) -> None:
    model = packed(small(activation_checkpointing=checkpointing)).train()
    calls: list[int] = []
    for number, layer in enumerate(model.hf.bert.encoder.layer):
        layer.intermediate.register_forward_hook(lambda *_, number=number: calls.append(number))
    losses_of(model, make_batch(1, 3)).backward()
    assert calls == ([0, 1, 1, 0] if checkpointing else [0, 1])


def test_logits_at_masked_positions_of_a_sample_of_the_greatest_length() -> None:
    config = small()
    model = packed(config).eval()
    reference = reference_of(model, config).eval()
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, VOCAB, 40).astype(np.uint16)
    tokens[[0, 20, 39]] = 2, 3, 3
    ids = sample_ids(0, 0, 1)
    lengths = np.asarray([(21, 40)], np.uint16)
    masks = draw_masks(Unmasked(tokens, lengths, ids), 0, default_masking(), FACTS.mask_vocabulary)
    long = pack([(Samples(tokens, lengths, np.zeros(1, np.uint8), ids, None), masks)])
    with torch.no_grad():
        mlm, nsp = model(long)
        theirs = reference(**padded(long))
    torch.testing.assert_close(mlm, theirs.prediction_logits[0, long.masked_index_M], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(nsp, theirs.seq_relationship_logits, atol=1e-4, rtol=1e-4)
    assert mlm.shape == (len(long.mlm_labels_M), VOCAB)  # padded rows are never predicted


def test_each_sample_is_alone() -> None:
    """Logits of a sample do not depend on its neighbours: attention and the pooler stay inside it."""
    model = packed(small()).eval()
    batch = make_batch(5, 6)
    with torch.no_grad():
        mlm, nsp = model(batch)
        for i, row in enumerate(rows_of(batch)):
            inside = (batch.masked_index_M >= row.start) & (batch.masked_index_M < row.stop)
            alone = MicroBatch(
                batch.input_ids_T[row],
                batch.position_ids_T[row],
                batch.token_type_ids_T[row],
                torch.tensor([0, row.stop - row.start], dtype=torch.int32),
                batch.masked_index_M[inside] - row.start,
                batch.mlm_labels_M[inside],
                batch.nsp_labels_N[i : i + 1],
                row.stop - row.start,
                0,
                row.stop - row.start,
                int(inside.sum()),
            )
            mlm_alone, nsp_alone = model(alone)
            torch.testing.assert_close(mlm[inside], mlm_alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(nsp[i : i + 1], nsp_alone, atol=1e-5, rtol=1e-5)
    assert len({tuple(row) for row in nsp.tolist()}) == 6


def test_bounded_batches_give_the_same_loss_and_gradients() -> None:
    batch = make_batch(8, 5)
    results = []
    for given in (batch, bounded(batch)):
        model = packed(small())
        logits = model(given)
        loss = pretraining_loss(
            logits,
            given.mlm_labels_M,
            given.nsp_labels_N,
            weights=LossConfig(mlm_weight=1.0, nsp_weight=1.0, z_loss_weight=0.0),
            masked=given.num_masked,
            pairs=len(given.nsp_labels_N),
        )
        loss.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss, gradients))
    (alone, exact), (padded, bound) = results
    torch.testing.assert_close(padded.loss, alone.loss)
    torch.testing.assert_close(padded.sums, alone.sums)
    assert exact.keys() == bound.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(bound[name], gradient, atol=1e-6, rtol=1e-5)


def test_token_types_and_positions_matter() -> None:
    """What the embeddings of types and positions receive reaches the logits."""
    model = packed(small()).eval()
    batch = make_batch(6, 4)
    with torch.no_grad():
        mlm, nsp = model(batch)
        for changed in (
            batch._replace(token_type_ids_T=1 - batch.token_type_ids_T),
            batch._replace(position_ids_T=batch.position_ids_T + 1),
        ):
            other_mlm, other_nsp = model(changed)
            assert not torch.allclose(mlm, other_mlm, atol=1e-3)
            assert not torch.allclose(nsp, other_nsp, atol=1e-3)


@pytest.mark.parametrize("architecture", list(Architecture))
def test_dropout_that_is_set_is_that_of_a_model_made_with_it(architecture: Architecture) -> None:
    curved = packed(small(architecture=architecture, dropout=[[0, 0.2], [1, 0]], attention_dropout=[[0, 0], [1, 0.4]]))
    plain = packed(small(architecture=architecture, dropout=0.1, attention_dropout=0.3))
    curved.set_dropout(0.1, 0.3)

    def loss_of(model: PackedBert) -> float:
        torch.manual_seed(1)
        return losses_of(model.train(), make_batch(7, 4)).item()

    assert loss_of(curved) == loss_of(plain)
    plain.set_dropout(0.1, 0.0)
    assert loss_of(curved) != loss_of(plain)


@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.5, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_kind_of_dropout_follows_the_seed(dropout: float, attention_dropout: float, checkpointing: bool) -> None:
    config = small(dropout=dropout, attention_dropout=attention_dropout, activation_checkpointing=checkpointing)
    model = packed(config).train()
    batch = make_batch(7, 4)

    def trained(seed: int) -> tuple[float, Tensor]:
        model.zero_grad()
        torch.manual_seed(seed)
        loss = losses_of(model, batch)
        loss.backward()
        return loss.item(), gradients(model)["bert.embeddings.position_embeddings.weight"].clone()

    (one, one_gradient), (again, again_gradient), (other, _) = trained(1), trained(1), trained(2)
    assert one == again
    assert torch.equal(one_gradient, again_gradient)  # recomputed activations drop the same
    assert one != other
    model.eval()
    with torch.no_grad():
        assert losses_of(model, batch) == losses_of(model, batch)


def test_dropout_is_another_at_every_step_micro_batch_and_rank() -> None:
    """And the same where those are the same: a resumed run drops what the uninterrupted one does."""

    def drawn(*place: int) -> float:
        seed_dropout(*place)
        return float(torch.rand(()))

    places = list(itertools.product((1, 2), (0, 1, 70_000), (0, 1), (0, 1)))
    assert len({drawn(*place) for place in places}) == len(places)
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]


def test_the_decoder_is_tied() -> None:
    model = packed(small())
    assert model.hf.cls.predictions.decoder.weight is model.hf.bert.embeddings.word_embeddings.weight
    assert sum("decoder" in name for name, _ in model.named_parameters()) == 0


def on_a_cpu(config: ModelConfig, *, plain: bool = False) -> PackedBert:
    """With random weights and this machine's kernels; `plain`: autograd makes the table's gradient on its own."""
    torch.manual_seed(0)
    model = PackedBert(config, FACTS, max_len=40, kernel=Attention.cpu)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if plain:
        model.hf.get_input_embeddings().__class__ = nn.Embedding
    return model.train()


class Operators(TorchDispatchMode):
    """How often each operator runs, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pad_vocab_to", [1, 64])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", list(Architecture))
def test_rows_added_to_the_heads_gradient_are_autograds_sum(
    architecture: Architecture, checkpointing: bool, pad_vocab_to: int
) -> None:
    """Of two micro-batches with words that come many times and padding; and no table of zeros is filled for them."""
    config = small(architecture=architecture, activation_checkpointing=checkpointing, pad_vocab_to=pad_vocab_to)
    objective = "nsp" if architecture is Architecture.bert else "none"
    found = []
    for plain in (False, True):
        model = on_a_cpu(config, plain=plain)
        with Operators() as operators:
            for seed in (1, 2):
                losses_of(model, bounded(make_batch(seed, 9, objective=objective))).backward()
        tables = operators.names["embedding_dense_backward"]
        found.append((model.hf.get_input_embeddings().weight, gradients(model), tables))
    (table, ours, our_tables), (_, theirs, their_tables) = found
    assert their_tables - our_tables == 2
    assert table.grad.layout is torch.strided
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-6)
        assert ours[name] is table.grad or torch.equal(ours[name], gradient), name


def test_in_bf16_rows_are_summed_before_they_meet_the_heads_gradient() -> None:
    """One by one they would be rounded off beside it: all is as autograd does it, to the bit."""
    ours, theirs = (on_a_cpu(small(), plain=plain).bfloat16() for plain in (False, True))
    for model in (ours, theirs):
        losses_of(model, make_batch(1, 9)).backward()
    assert all(torch.equal(gradient, gradients(theirs)[name]) for name, gradient in gradients(ours).items())


def test_a_table_that_the_head_does_not_share_has_a_gradient_of_its_own() -> None:
    table = on_a_cpu(small(extra=UNTIED)).hf.get_input_embeddings()
    assert type(table) is nn.Embedding


def test_positions_must_suffice() -> None:
    with pytest.raises(UserError, match=r"set model\.max_positions=41 or prepare with a smaller max_len"):
        PackedBert(small(), FACTS, max_len=41)


@pytest.mark.parametrize(("size", "multiple", "rows"), [(61, 64, 64), (64, 64, 64), (65, 64, 128), (61, 1, 61)])
def test_padded_vocabulary(size: int, multiple: int, rows: int) -> None:
    assert padded_vocab_size(size, multiple) == rows


def test_weights_of_another_model_are_refused_in_one_line() -> None:
    model = packed(small())
    weights = {name: parameter.detach() for name, parameter in model.hf.named_parameters()}
    twin = packed(small(), seed=9)
    twin.load_weights(weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in twin.hf.named_parameters())
    for other in (small(hidden_size=16), small(num_layers=3), small(pad_vocab_to=1), small(max_positions=64)):
        with pytest.raises(UserError, match="resume with the same model options, or name another run") as caught:
            packed(other).load_weights(weights)
        assert "\n" not in str(caught.value)


# Loss


WEIGHTS = LossConfig(mlm_weight=0.7, nsp_weight=1.3, z_loss_weight=0.0)


def random_logits(masked: int, pairs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(masked, VOCAB, generator=generator, requires_grad=True),
        torch.randn(pairs, 2, generator=generator, requires_grad=True),
        torch.randint(VOCAB, (masked,), generator=generator),
        torch.randint(2, (pairs,), generator=generator),
    )


def test_loss_of_parts_adds_up_to_the_mean_over_the_whole() -> None:
    mlm, nsp, mlm_labels, nsp_labels = random_logits(30, 9)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = 0.7 * cross_entropy(mlm, mlm_labels) + 1.3 * cross_entropy(nsp, nsp_labels)
    expected_gradients = torch.autograd.grad(expected, (mlm, nsp))

    total, sums = torch.zeros(()), torch.zeros(4, dtype=torch.float64)
    for (a, b), (c, d) in (((0, 2), (0, 4)), ((2, 29), (4, 5)), ((29, 30), (5, 9))):  # uneven: means would not do
        part = pretraining_loss(
            (mlm[a:b].clone(), nsp[c:d]), mlm_labels[a:b], nsp_labels[c:d], weights=WEIGHTS, masked=30, pairs=9
        )
        total, sums = total + part.loss, sums + part.sums
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(torch.autograd.grad(total, (mlm, nsp)), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    assert sums[2] == (mlm.argmax(1) == mlm_labels).sum()
    assert sums[3] == (nsp.argmax(1) == nsp_labels).sum()


def test_without_pairs_nsp_weighs_nothing() -> None:
    mlm, nsp, mlm_labels, nsp_labels = random_logits(12, 5)
    loss = pretraining_loss((mlm.clone(), nsp), mlm_labels, nsp_labels, weights=WEIGHTS, masked=12, pairs=0).loss
    torch.testing.assert_close(loss, 0.7 * torch.nn.functional.cross_entropy(mlm, mlm_labels))
    assert not torch.autograd.grad(loss, nsp)[0].any()


def test_a_batch_without_masks_has_a_finite_loss() -> None:
    mlm, nsp, mlm_labels, nsp_labels = random_logits(0, 3)
    loss = pretraining_loss((mlm, nsp), mlm_labels, nsp_labels, weights=WEIGHTS, masked=0, pairs=3).loss
    torch.testing.assert_close(loss, 1.3 * torch.nn.functional.cross_entropy(nsp, nsp_labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 10**6])
@pytest.mark.parametrize("z_weight", [0.0, 0.03])
def test_cross_entropy_and_its_gradient_equal_torchs(
    chunk: int, z_weight: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of rows at a time; with labels that do not count, and a loss scale as fp16 has it."""
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", chunk)
    mlm, _, labels, _ = random_logits(13, 1)
    labels[[2, 12]] = -100
    ours = (mlm * 4).to(dtype).detach().requires_grad_()
    theirs = ours.detach().float().requires_grad_()
    found, entropy, correct = loss._masked_cross_entropy(ours.clone(), labels, z_weight)  # which it overwrites
    expected = torch.nn.functional.cross_entropy(theirs, labels, reduction="sum")
    torch.testing.assert_close(entropy, expected.detach())
    expected = expected + z_weight * theirs.logsumexp(1)[labels != -100].square().sum()
    torch.testing.assert_close(found, expected)
    assert correct == (theirs.argmax(1) == labels).sum()
    (found * 4099.0).backward()
    (expected * 4099.0).backward()
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    tolerance = {} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(ours.grad.float(), theirs.grad, **tolerance)


def test_of_several_best_words_the_first_counts() -> None:
    logits = torch.tensor([[1.0, 3, 3], [1, 3, 3], [3, 3, 3], [2, 1, 0]])
    labels = torch.tensor([1, 2, 0, 1])
    _, _, correct = loss._masked_cross_entropy(logits, labels, 0.0)
    assert correct == (logits.argmax(1) == labels).sum() == 2


def test_logits_of_rows_that_pad_the_vocabulary_count_for_nothing() -> None:
    model, batch = packed(small()), make_batch(3, 5)
    logits = model.train()(batch)[0]
    assert logits.shape[1] == model.vocab_rows > VOCAB
    assert (logits[:, VOCAB:] == -torch.inf).all()
    assert model.eval()(batch)[0].shape[1] == VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_a_cpu_is_dropout(dtype: torch.dtype) -> None:
    dropout = cpu_dropout.Dropout(0.25)
    x = torch.randn(37, 1001).to(dtype).requires_grad_()
    torch.manual_seed(3)
    out = dropout(x)
    kept = out != 0
    assert abs(kept.double().mean() - 0.75) < 4 * (0.75 * 0.25 / x.numel()) ** 0.5
    close = 1e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, torch.where(kept, x / 0.75, 0), rtol=close, atol=0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (kept / 0.75).to(dtype), rtol=close, atol=0)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), out), "it follows from the seed"
    assert not torch.equal(dropout(x), out)
    assert dropout.eval()(x) is x
    assert torch.equal(cpu_dropout.Dropout(0.0)(x), x)


def test_a_model_for_the_cpu_drops_out_with_our_own() -> None:
    def kinds(kernel: Attention) -> set[type]:
        model = PackedBert(small(dropout=0.1), FACTS, max_len=40, kernel=kernel)
        return {type(part) for part in model.modules() if isinstance(part, torch.nn.Dropout)}

    assert cpu_dropout.Dropout in kinds(Attention.cpu)
    assert kinds(Attention.sdpa) == {torch.nn.Dropout}


def test_cross_entropy_is_computed_in_fp32() -> None:
    mlm, nsp, mlm_labels, nsp_labels = random_logits(40, 9)
    half = (mlm.bfloat16(), nsp.bfloat16())
    found = pretraining_loss(half, mlm_labels, nsp_labels, weights=WEIGHTS, masked=40, pairs=9)
    wide = (mlm.bfloat16().float(), half[1].float())
    expected = pretraining_loss(wide, mlm_labels, nsp_labels, weights=WEIGHTS, masked=40, pairs=9)
    assert found.loss == expected.loss
    assert found.sums.dtype == torch.float64


# Parameter groups


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = packed(small())
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers, others, rest = parameter_groups(model.named_parameters(), 0.01)
    assert [group["weight_decay"] for group in (layers, others, rest)] == [0.01, 0.01, 0.0]
    assert all(".layer." in names[parameter] for parameter in layers["params"])
    assert not any(".layer." in names[parameter] for parameter in others["params"])
    decayed = {names[parameter] for parameter in [*layers["params"], *others["params"]]}
    spared = {names[parameter] for parameter in rest["params"]}
    assert decayed | spared == set(names.values())
    assert not decayed & spared
    assert spared == {name for name in names.values() if name.endswith("bias") or "LayerNorm" in name}
