"""What is particular to the tokenizers of one model: special tokens, layout of pairs, what decides ids, how words look.

A kind says so of a `tokenizers.Tokenizer`; this base asks the tokenizer itself, as tokenizer.json describes it. Knows
neither corpora nor configuration.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

from tokenizers import AddedToken, Tokenizer, processors

from cloze.errors import UserError

ROLES = ("pad", "unk", "cls", "sep", "mask")
_ALIASES = {"cls": "bos", "sep": "eos"}  # keys that older files have
_KNOWN = {  # names by role, where no file beside tokenizer.json tells
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>", "<bos>", "<|begin_of_text|>"),
    "sep": ("[SEP]", "</s>", "<eos>", "<|end_of_text|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}
_MEANINGS = {"pad": "pad", "unk": "unknown", "cls": "first ([CLS])", "sep": "separator ([SEP])", "mask": "mask"}
UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]|madeupword\d+")  # places that vocabularies keep free
_PROBES = ("a", "0", ".", "the")  # texts, one of which has tokens in every tokenizer


class Specials(NamedTuple):
    """The special tokens by their roles; `unk` is "" where no text is unknown."""

    pad: str
    unk: str
    cls: str
    sep: str
    mask: str


class Layout(NamedTuple):
    """How the post-processor lays samples out: [CLS] A [SEP], and [CLS] A [SEP] B [SEP]."""

    cls: str
    sep: str
    separators: int  # [SEP]s between A and B: 1 or 2; 0 where pairs are laid out in another way
    token_types: bool  # whether B has the token type 1


class Kind:
    """The tokenizers of one model."""

    kinds: ClassVar[dict[str, "Kind"]] = {}  # by the model's name in tokenizer.json
    name: ClassVar[str]  # in configurations
    continuation: ClassVar[str] = ""  # with which a token begins that goes on with a word, if such a thing is there

    def __init_subclass__(cls, name: str, model: str) -> None:
        cls.name = name
        Kind.kinds[model] = cls()

    def specials(self, backend: Tokenizer, given: Mapping[str, str], where: str) -> Specials:
        """The special tokens: the post-processor's, those that files beside tokenizer.json name, or well-known ones."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        layout = self.layout(backend, where)
        names = {**given, **({"cls": layout.cls, "sep": layout.sep} if layout else {})}
        if unknown := self.unknown(backend):
            names["unk"] = unknown
        found = {
            role: names.get(role) or _first(_KNOWN[role], special) or _first(_KNOWN[role], vocabulary) for role in ROLES
        }
        missing = [role for role in ROLES if found[role] not in vocabulary]
        if "unk" in missing and not self.may_be_unknown(backend):
            missing.remove("unk")
            found["unk"] = ""
        if missing:
            raise UserError(
                f"{where}: has no {' and no '.join(f'{_MEANINGS[role]} token' for role in missing)}; add it to "
                "tokenizer.json, and name it in tokenizer_config.json beside it"
            )
        return Specials(**found)

    def unknown(self, backend: Tokenizer) -> str | None:
        """The token that the model gives for what it does not know."""
        return None

    def may_be_unknown(self, backend: Tokenizer) -> bool:
        """Whether there is text that has no tokens but the unknown one."""
        return True

    def layout(self, backend: Tokenizer, where: str) -> Layout | None:
        """As the post-processor has it, asked by laying something out; None if it adds no special token.

        Raises `UserError` where a single segment is not laid out as [CLS] A [SEP].
        """
        text = next((text for text in _PROBES if backend.encode(text, add_special_tokens=False).ids), _PROBES[0])
        single, pair = (_parts(backend.encode(*texts)) for texts in ((text,), (text, text)))
        if single == ["A"]:
            return None
        if [part == "A" for part in single] != [False, True, False]:
            raise UserError(
                f"{where}: its post-processor makes {' '.join(single)} of a text A; Cloze trains on a first token, A "
                "and a separator: change it there"
            )
        first, last = single[0], single[-1]
        between = pair[2:-2]
        separators = len(between) if pair == [first, "A", *[last] * len(between), "B", last] else 0
        types = backend.encode(text, text).type_ids
        return Layout(first, last, separators if separators in (1, 2) else 0, any(types))

    def prepare(self, backend: Tokenizer, specials: Specials) -> None:
        """Make `backend` what shards and exported models have: special tokens, and a layout where it has none."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        names = [token for token in dict.fromkeys(specials) if token and token not in known]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names])
        if self.layout(backend, "") is None:
            backend.post_processor = bert_layout(specials, vocabulary)

    def never_drawn(self, backend: Tokenizer, vocabulary: Mapping[str, int]) -> Iterable[int]:
        """Ids besides the five that stand for no text: they are never drawn as random replacements."""
        added = backend.get_added_tokens_decoder().items()
        yield from (index for index, token in added if token.special)
        yield from (index for token, index in vocabulary.items() if UNUSED.fullmatch(token))
        yield from set(range(max(vocabulary.values()) + 1)) - set(vocabulary.values())

    def deciding(self, backend: Tokenizer, vocabulary: Mapping[str, int]) -> Any:
        """What of model and added tokens decides the ids of a text besides the vocabulary, as JSON knows it."""
        model = json.loads(backend.model.__getstate__())
        if isinstance(model["vocab"], dict):
            del model["vocab"]
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())]
        ordinary = (token for token in backend.get_added_tokens_decoder().values() if not token.special)
        added = [[t.content, t.single_word, t.lstrip, t.rstrip, t.normalized] for t in ordinary]
        return [model, sorted(added)]

    def token_of(self, backend: Tokenizer, word: str) -> str:
        """The token that a word after a space would be. Raises `UserError` where none would be found in a text."""
        raise UserError(f"words cannot be added to a tokenizer of kind {self.name} that does not cut text at spaces")

    def place(self, backend: Tokenizer, model: dict[str, Any], placed: Mapping[str, int]) -> None:
        """Give tokens of `token_of` ids in `model`, as tokenizer.json has it; what had those ids goes."""
        others = {token: index for token, index in model["vocab"].items() if index not in {*placed.values()}}
        model["vocab"] = dict(sorted({**others, **placed}.items(), key=lambda item: item[1]))

    def begins_word(self, token: str) -> bool:
        """Whether people write a space before a token."""
        return not (self.continuation and token.startswith(self.continuation))

    def readable(self, token: str) -> str:
        """A token as people read it."""
        return token


def kind_of(model: str | None, where: str) -> Kind:
    """The kind whose model has that name in tokenizer.json. Raises `UserError` where there is none."""
    if model not in Kind.kinds:
        names = ", ".join(f"{name} ({kind.name})" for name, kind in Kind.kinds.items())
        raise UserError(f"{where}: its model is {model}, which Cloze does not know; it knows {names}")
    return Kind.kinds[model]


def bert_layout(specials: Specials, vocabulary: Mapping[str, int]) -> processors.TemplateProcessing:
    """[CLS] A [SEP], and [CLS] A [SEP] B [SEP] with the token type 1 from B on."""
    cls, sep = specials.cls, specials.sep
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )


def _parts(encoding: Any) -> list[str]:
    """Special tokens, and "A" and "B" for all of a segment's."""
    rows = zip(encoding.sequence_ids, encoding.special_tokens_mask, encoding.tokens, strict=True)
    names = (token if special else "AB"[sequence or 0] for sequence, special, token in rows)
    return [name for name, group in groupby(names) for name in ([name] if name in "AB" else group)]


def given_names(files: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The special tokens by role that files of `transformers` name; earlier ones count first."""
    found: dict[str, str] = {}
    for role in ROLES:
        for body in files:
            for name in (role, _ALIASES.get(role)):
                value = body.get(f"{name}_token")
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str) and text:
                    found.setdefault(role, text)
    return found


def _first(names: Sequence[str], vocabulary: Collection[str]) -> str:
    return next((name for name in names if name in vocabulary), "")
