"""Low-rank updates in the place of full fine-tuning (LoRA, Hu et al. 2021), by peft."""

import warnings
from typing import Any

from torch import nn

from cloze.errors import UserError
from finetune.keys import LoraConfig


def with_lora(model: Any, config: LoraConfig) -> Any:
    """`model` with low-rank updates in each linear layer of its encoder; what is new is trained whole."""
    try:
        import peft
    except ModuleNotFoundError:
        raise UserError("lora.rank: needs peft: pip install 'cloze[finetune]'") from None
    encoder = model.base_model_prefix
    new = [name for name, child in model.named_children() if name != encoder and any(True for _ in child.parameters())]
    linear = [f"{encoder}.{name}" for name, child in model.base_model.named_modules() if isinstance(child, nn.Linear)]
    settings = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    own = peft.LoraConfig(**settings, target_modules=linear, modules_to_save=new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a property of transformers that peft reads
        return peft.get_peft_model(model, own)
