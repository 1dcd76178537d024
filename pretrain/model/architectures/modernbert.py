"""ModernBERT (Warner et al. 2024): rotary positions, gated feed-forward parts, local layers between global ones."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import ModernBertForMaskedLM, PreTrainedConfig

from cloze.corpus.manifest import TokenizerFacts
from cloze.errors import UserError
from pretrain.config import Architecture, ModelConfig
from pretrain.data.loader import MicroBatch
from pretrain.model.blueprint import Blueprint
from pretrain.model.last_layer import LastPreNormLayer

_LAYERS = {"global": "full_attention", "local": "sliding_attention"}
_SCALINGS = ("linear", "yarn")  # of positions, besides by theta; both without state
_SCALING = "global_rope_scaling"


class ModernBert(Blueprint):
    architecture = Architecture.modernbert
    model_class = ModernBertForMaskedLM
    model_types: ClassVar[tuple[str, ...]] = ("modernbert",)
    extra: ClassVar[Mapping[str, Any]] = {
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        _SCALING: None,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "decoder_bias": True,
        "tie_word_embeddings": True,
    }
    encoder_parts: ClassVar[tuple[str, ...]] = ("embeddings.", "layers.", "final_norm.")
    heads: ClassVar[tuple[str, ...]] = ("head", "decoder")
    tied = ("decoder.weight", "model.embeddings.tok_embeddings.weight")
    last_layer = LastPreNormLayer
    attention_dropout = "attn.out_drop"

    def own_keys(self, model: ModelConfig, tokenizer: TokenizerFacts) -> dict[str, Any]:
        dropout = model.dropout_curve.at(1.0)
        return {
            "embedding_dropout": dropout,
            "mlp_dropout": dropout,
            "attention_dropout": model.attention_dropout_curve.at(1.0),
            "bos_token_id": tokenizer.cls_id,
            "eos_token_id": tokenizer.sep_id,
            "cls_token_id": tokenizer.cls_id,
            "sep_token_id": tokenizer.sep_id,
        }

    def read_config(self, keys: Mapping[str, Any], where: str) -> PreTrainedConfig:
        scaling = keys.get(_SCALING)
        config = super().read_config({key: value for key, value in keys.items() if key != _SCALING}, where)
        if scaling is not None:
            _check_scaling(scaling, where)
            config.rope_parameters[_LAYERS["global"]] |= dict(scaling)
        return config

    def described_extra(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Raises `UserError` where positions are scaled in a way not known here, or the layers follow no pattern."""
        found = {key: getattr(config, key) for key in self.extra if hasattr(config, key)} | {_SCALING: None}
        for kind, layers in _LAYERS.items():
            rope = config.rope_parameters[layers]
            scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
            if scaling.get("rope_type", "default") != "default":
                if kind != "global" or scaling["rope_type"] not in _SCALINGS:
                    raise UserError(
                        f"rope_parameters: scaling by {rope['rope_type']} in {kind} layers is not known here; only by "
                        f"theta, and in global layers by {' and '.join(_SCALINGS)}"
                    )
                found[_SCALING] = scaling
            found[f"{kind}_rope_theta"] = float(rope["rope_theta"])
        count, kinds = config.num_hidden_layers, list(config.layer_types)
        for every in (self.extra["global_attn_every_n_layers"], *range(1, count + 1)):
            if kinds == [_LAYERS["local" if number % every else "global"] for number in range(count)]:
                return {**found, "global_attn_every_n_layers": every}
        raise UserError("layer_types: global layers do not come at even distances from the first on")

    def layers(self, hf: Any) -> nn.ModuleList:
        found: nn.ModuleList = hf.base_model.layers
        return found

    def encode(self, hf: Any, batch: MicroBatch, **options: Any) -> Tensor:
        hidden_TxC: Tensor = hf.base_model(
            input_ids=batch.input_ids_T[None], position_ids=batch.position_ids_T[None], **options
        ).last_hidden_state[0]
        return hidden_TxC

    def predict(self, hf: Any, hidden_MxC: Tensor) -> Tensor:
        logits_MxR: Tensor = hf.decoder(hf.head(hidden_MxC))
        return logits_MxR

    def window(self, hf: Any) -> int | None:
        return int(hf.config.sliding_window) + 1

    def set_rotary(self, hf: Any, model: ModelConfig) -> None:
        keys, rotary = {**self.extra, **(model.extra or {})}, hf.base_model.rotary_emb
        if keys[_SCALING] is not None:
            _check_scaling(keys[_SCALING], "model.extra")
        for kind, layers in _LAYERS.items():
            rope = {"rope_type": "default", "rope_theta": float(keys[f"{kind}_rope_theta"])}
            hf.config.rope_parameters[layers] = rope | dict((keys[_SCALING] or {}) if kind == "global" else {})
        fresh = type(rotary)(hf.config)  # in fp32: in bf16 they would be off by radians at 8,192
        for name, buffer in fresh.named_buffers():
            setattr(rotary, name, buffer.to(getattr(rotary, name).device))
        for name in ("rope_type", *(f"{layers}_attention_scaling" for layers in fresh.layer_types)):
            setattr(rotary, name, getattr(fresh, name))

    def set_attention_dropout(self, hf: Any, probability: float) -> None:
        for layer in hf.base_model.layers:
            layer.attn.attention_dropout = probability


def _check_scaling(scaling: Any, where: str) -> None:
    """Raises `UserError` where `global_rope_scaling` is none."""
    example = "{rope_type:yarn,factor:8,original_max_position_embeddings:1024}"
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") not in _SCALINGS or "factor" not in scaling:
        raise UserError(f"{where}: {_SCALING} is no scaling by {' or '.join(_SCALINGS)}, such as {example}")
    if scaling["rope_type"] == "yarn" and "original_max_position_embeddings" not in scaling:
        raise UserError(f"{where}: {_SCALING}: yarn needs original_max_position_embeddings, as in {example}")


BLUEPRINT = ModernBert()
