"""`python -m finetune.probe out/books "The [MASK] sat."`: what an encoder knows before any fine-tuning.

Texts with [MASK] are filled in; texts without are compared by their mean hidden states, which is crude, but tells
whether anything was learned (Reimers and Gurevych 2019, table 1, have it for BERT).
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloze import cli
from cloze.errors import ExitCode
from cloze.log import closing
from pretrain.export.positions import num_positions

if TYPE_CHECKING:  # torch and transformers take seconds, and --help none of them
    from torch import Tensor

PARSER = cli.parser("finetune.probe", "Fill gaps, or compare texts, without fine-tuning.")
PARSER.add_argument("model", type=Path, help="directory made by `python -m pretrain.export`")
PARSER.add_argument("texts", nargs="+", help="with [MASK]: filled in; without: their similarities, each with each")


def fill_masks(folder: Path, texts: Sequence[str], top: int = 5) -> list[list[list[tuple[str, float]]]]:
    """For each text and each of its [MASK]s, the likeliest tokens with their probabilities."""
    import torch
    from transformers import AutoModelForMaskedLM

    from pretrain.export.hugging_face import load_pretrained, load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = load_pretrained(AutoModelForMaskedLM, folder, purpose="filling gaps")
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=num_positions(folder), return_tensors="pt")
        with torch.inference_mode():
            probabilities_TV = model(**inputs).logits[0].softmax(-1)
        best = [row.topk(top) for row in probabilities_TV[inputs.input_ids[0] == tokenizer.mask_token_id]]
        found.append(
            [
                list(zip(tokenizer.convert_ids_to_tokens(b.indices.tolist()), b.values.tolist(), strict=True))
                for b in best
            ]
        )
    return found


def mean_states(folder: Path, texts: Sequence[str]) -> "Tensor":
    """The mean last hidden state of each text's tokens, padding and specials left out, scaled to length 1: [N, H]."""
    import torch
    from transformers import AutoModel

    from pretrain.export.hugging_face import load_pretrained, load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = load_pretrained(AutoModel, folder)
    inputs: Any = tokenizer(
        list(texts),
        truncation=True,
        max_length=num_positions(folder),
        padding=True,
        return_tensors="pt",
        return_special_tokens_mask=True,
    )
    own_NT = 1 - inputs.pop("special_tokens_mask")
    with torch.inference_mode():
        states_NTH = model(**inputs).last_hidden_state
    sums_NH = (states_NTH * own_NT[..., None]).sum(1)
    return torch.nn.functional.normalize(sums_NH, dim=-1)  # of the sum as of the mean


@cli.command(PARSER)
def main(options: Namespace) -> int:
    from pretrain.export.hugging_face import be_quiet

    be_quiet()
    gaps = [text for text in options.texts if "[MASK]" in text]
    plain = [text for text in options.texts if "[MASK]" not in text]
    for text, masks in zip(gaps, fill_masks(options.model, gaps) if gaps else [], strict=True):
        print(text)
        for best in masks:
            print("   " + "  ".join(f"{token} {share:.0%}" for token, share in best))
    if plain:
        states_NH = mean_states(options.model, plain)
        for text, row in zip(plain, states_NH @ states_NH.T, strict=True):
            print("  ".join(f"{value:5.2f}" for value in row.tolist()) + f"  {text}")
    closing(f"{options.model}: looked at; nothing is saved")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
