"""Tokenizers of the kinds that published encoders have, made by code: none can be downloaded where tests run."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.unit.corpora import documents

TEXTS = [
    *documents(60),
    "Caf\u00e9 na\u00efve \u4e2d\u6587 "
    "\u6211\u7231\u5317\u4eac don't it's 3.14 (x) [y] \u0418\u0432\u0430\u043d\u044b ",
] * 2
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
MODERNBERT = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")


def make(kind: str, folder: Path, vocab_size: int = 500) -> Path:
    """`folder` with a tokenizer of one of `KINDS` in the files that transformers writes."""
    folder.mkdir(parents=True, exist_ok=True)
    backend, config = {"roberta": roberta, "modernbert": modernbert, "xlmr": xlmr, "mmbert": mmbert}[kind](vocab_size)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = ("roberta", "modernbert", "xlmr", "mmbert")


def byte_level(vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*specials], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def roberta(vocab_size: int) -> tuple[Tokenizer, dict]:
    backend = byte_level(vocab_size - 1, ROBERTA)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    names = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>"}
    config = {f"{role}_token": name for role, name in names.items()}
    return backend, {
        **config,
        "mask_token": {"content": "<mask>", "lstrip": True},
        "tokenizer_class": "RobertaTokenizer",
    }


def modernbert(vocab_size: int) -> tuple[Tokenizer, dict]:
    """Runs of spaces are tokens, e-mail addresses were hidden, unused tokens stand at the end."""
    backend = byte_level(vocab_size - 13, ["|||IP_ADDRESS|||", "<|padding|>"])
    backend.normalizer = normalizers.NFC()
    runs = [AddedToken(" " * count, normalized=True) for count in (4, 3, 2)]
    backend.add_tokens([*runs, AddedToken("|||EMAIL_ADDRESS|||", normalized=False)])
    specials = [AddedToken(name, special=True, normalized=False, lstrip=name == "[MASK]") for name in MODERNBERT]
    backend.add_special_tokens(specials)
    backend.add_tokens([AddedToken(f"[unused{number}]", normalized=True) for number in range(4)])
    cls, sep = (backend.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in MODERNBERT}
    return backend, {**names, "model_input_names": ["input_ids", "attention_mask"]}


def xlmr(vocab_size: int) -> tuple[Tokenizer, dict]:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 1, special_tokens=[*ROBERTA], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend, {"tokenizer_class": "XLMRobertaTokenizer"}


def mmbert(vocab_size: int) -> tuple[Tokenizer, dict]:
    """Gemma's: BPE of characters, spaces as U+2581, nothing split; bytes for what is unknown."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", "<unused1>"]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    every = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=every, show_progress=False)
    )
    state = json.loads(learner.model.__getstate__())
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in state["merges"]]
    backend = Tokenizer(models.BPE(state["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return backend, {"model_input_names": ["input_ids", "attention_mask"]}
