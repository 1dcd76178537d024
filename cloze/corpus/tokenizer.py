"""WordPiece tokenizers: load one, tell two apart, save one that `AutoTokenizer` loads as BERT's.

Knows the files of a tokenizer directory; knows neither corpora nor configuration. Needs `tokenizers`, not transformers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.scripts import unspaced_pre_tokenizer
from cloze.errors import UserError
from cloze.log import log

_CASED = 0.01  # share of tokens with capitals from which a vocabulary is a cased one: published ones have 0 or 0.3

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Spelling(NamedTuple):
    """How text is normalized before it is split."""

    lowercase: bool = True
    strip_accents: bool | None = None  # None: where it lower-cases
    ideographs: bool = True  # each a word of its own
    clusters: bool = False  # of scripts without spaces: a letter with its marks is a word of its own


BERT = Spelling()  # the uncased one


@dataclass(frozen=True)
class WordPiece:
    """A tokenizer and what shards say of it."""

    backend: Tokenizer
    facts: TokenizerFacts
    vocabulary: Mapping[str, int]  # added tokens, too; to ask the backend for it costs as much as encoding 100 kB

    @property
    def spelling(self) -> Spelling:
        """How it normalizes text; of a normalizer other than BERT's nothing is known, so nothing is said to be lost."""
        normalizer = _settings(self.backend.normalizer) or {}
        if normalizer.get("type") != "BertNormalizer":
            return Spelling(lowercase=False, strip_accents=False, ideographs=False)
        lowercase, strips = normalizer["lowercase"], normalizer["strip_accents"]
        ideographs = normalizer["handle_chinese_chars"]
        return Spelling(lowercase, lowercase if strips is None else strips, ideographs, cuts_clusters(self.backend))


def load_tokenizer(path: Path, spelling: Spelling = BERT) -> WordPiece:
    """The BERT WordPiece in directory `path` (tokenizer.json or vocab.txt), or of a vocab.txt file at `path`.

    `spelling` counts only where no file says it. Raises `UserError` for anything BERT cannot be pretrained with.
    """
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise UserError(f"tokenizer.path={path}: holds neither tokenizer.json nor vocab.txt; name a BERT tokenizer")
        path = found[0]
    elif not path.is_file():
        raise UserError(f"tokenizer.path={path}: no such file or directory; leave it out to train a tokenizer")
    try:
        return checked(_from_json(path) if path.suffix == ".json" else _from_vocabulary(path, spelling), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"tokenizer.path={path}: cannot be read ({error}); restore the file") from error


def save_tokenizer(tokenizer: WordPiece, directory: Path, max_len: int) -> None:
    """Write the four files that Hugging Face expects of a BERT tokenizer into the existing `directory`.

    transformers builds a `BertTokenizer` anew from the vocabulary, with BERT's own pre-tokenizer: one with another is
    therefore not called so, and tokenizer.json alone says what it does.
    """
    normalizer = _settings(tokenizer.backend.normalizer) or {}
    is_bert = not cuts_clusters(tokenizer.backend)
    names = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    config = {
        "tokenizer_class": "BertTokenizer" if is_bert else "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "do_lower_case": bool(normalizer.get("lowercase")),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": bool(normalizer.get("handle_chinese_chars")),
        **names,
    }
    if not is_bert:
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    vocabulary = tokenizer.vocabulary
    files = {
        "vocab.txt": "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)),
        "tokenizer.json": tokenizer.backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=1),
        "special_tokens_map.json": json.dumps(names, indent=1),
    }
    if len(vocabulary) < tokenizer.facts.vocab_size or not is_bert:  # a line's number is its id: no file tells of gaps
        del files["vocab.txt"]
    for name, text in files.items():
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _from_vocabulary(path: Path, spelling: Spelling) -> Tokenizer:
    text = path.read_text(encoding="utf-8-sig")  # line ends of any system become "\n"
    tokens = text.removesuffix("\n").split("\n")
    twice = [token for token, count in Counter(tokens).items() if count > 1 and token]
    if twice:
        log.warning(
            f"{path}: {len(twice):,} tokens stand there more than once (first: {twice[0]!r:.60}); "
            "the last place counts, as in BERT, and no other id moves"
        )
    if "" in tokens:
        log.warning(
            f"{path}: {tokens.count(''):,} empty lines (first: line {tokens.index('') + 1:,}); "
            "they count as ids that no text gets, as in BERT"
        )
    config_path = path.parent / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    if "do_lower_case" not in config and spelling.lowercase and (capitals := _capitals(tokens)):
        log.warning(
            f"{path}: {capitals:,} of its {len(tokens):,} tokens have capitals: read as a cased vocabulary, nothing is "
            'lower-cased; if it is none, put {"do_lower_case": true} into tokenizer_config.json beside it'
        )
        spelling = spelling._replace(lowercase=False)
    found = Spelling(
        bool(config.get("do_lower_case", spelling.lowercase)),
        config.get("strip_accents", spelling.strip_accents),
        bool(config.get("tokenize_chinese_chars", spelling.ideographs)),
    )
    return bert_pipeline(tokens, found)


def _capitals(tokens: Sequence[str]) -> int:
    """How many tokens lower-casing would make useless; 0 where they are so few that they may be accidents."""
    count = sum(token != token.lower() for token in tokens if not (token.startswith("[") and token.endswith("]")))
    return count if count > _CASED * len(tokens) else 0


def _from_json(path: Path) -> Tokenizer:
    text = path.read_text(encoding="utf-8")
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises nothing narrower
        body = json.loads(text)
        model = body.get("model") if isinstance(body, dict) else None
        _require_wordpiece(path, model.get("type") if isinstance(model, dict) else None)
        raise UserError(f"tokenizer.path={path}: {error}; restore the file") from error
    _require_wordpiece(path, type(backend.model).__name__)
    return backend


def _require_wordpiece(path: Path, model: str | None) -> None:
    if model != "WordPiece":
        raise UserError(f"tokenizer.path={path}: its model is {model}, not WordPiece; name a BERT tokenizer")


def bert_normalizer(spelling: Spelling) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        lowercase=spelling.lowercase, strip_accents=spelling.strip_accents, handle_chinese_chars=spelling.ideographs
    )


def bert_pre_tokenizer(spelling: Spelling) -> pre_tokenizers.PreTokenizer:
    return unspaced_pre_tokenizer() if spelling.clusters else pre_tokenizers.BertPreTokenizer()


def bert_pipeline(tokens: Sequence[str], spelling: Spelling) -> Tokenizer:
    """BERT's pipeline around a vocabulary; a token's id is its (last) place in `tokens`. "" is none."""
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens) if token}, unk_token=UNK))
    backend.normalizer = bert_normalizer(spelling)
    backend.pre_tokenizer = bert_pre_tokenizer(spelling)
    return backend


def checked(backend: Tokenizer, name: str) -> WordPiece:
    """Check that the specials are there; add what turns text into BERT's input and back."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    missing = [token for token in SPECIALS if token not in vocabulary]
    if missing:
        raise UserError(f"{name}: has no {' '.join(missing)}; BERT needs {' '.join(SPECIALS)}: name another tokenizer")
    backend.no_padding()
    backend.no_truncation()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])],
    )
    backend.decoder = decoders.WordPiece(prefix="##")
    facts = TokenizerFacts(
        fingerprint=_fingerprint(backend, vocabulary),
        vocab_size=max(vocabulary.values()) + 1,
        pad_id=vocabulary[PAD],
        unk_id=vocabulary[UNK],
        cls_id=vocabulary[CLS],
        sep_id=vocabulary[SEP],
        mask_id=vocabulary[MASK],
    )
    return WordPiece(backend, facts, vocabulary)


def _fingerprint(backend: Tokenizer, vocabulary: Mapping[str, int]) -> str:
    """sha256 over everything that decides which ids a text gets, and nothing else (not the layout of a file)."""
    model = backend.model
    deciding = {
        "vocabulary": sorted(zip(vocabulary.values(), vocabulary, strict=True)),
        "model": [model.unk_token, model.continuing_subword_prefix, model.max_input_chars_per_word],
        "normalizer": _settings(backend.normalizer),
        "pre_tokenizer": _settings(backend.pre_tokenizer),
    }
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def cuts_clusters(backend: Tokenizer) -> bool:
    """Whether a tokenizer cuts scripts without spaces as ours do."""
    return bool(_settings(backend.pre_tokenizer) == _settings(unspaced_pre_tokenizer()))


def _settings(part: Any) -> Any:
    """Those of a normalizer or a pre-tokenizer as they stand in tokenizer.json, without all of the vocabulary."""
    return None if part is None else json.loads(part.__getstate__())
