"""Tokenizers of every kind: load one, tell two apart, save one that `AutoTokenizer` loads.

Knows the files of a tokenizer directory; knows neither corpora nor configuration. Needs `tokenizers`, not transformers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from cloze.corpus.kinds.base import Kind, Specials, given_names, kind_of
from cloze.corpus.kinds.wordpiece import UNK
from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.scripts import unspaced_pre_tokenizer
from cloze.errors import UserError
from cloze.log import log

_CASED = 0.01  # share of tokens with capitals from which a vocabulary is a cased one: published ones have 0 or 0.3

_CONFIG, _SPECIALS_MAP = "tokenizer_config.json", "special_tokens_map.json"
_INPUTS = ("input_ids", "token_type_ids", "attention_mask")  # of a model, where a tokenizer has token types


class Spelling(NamedTuple):
    """How text is normalized before it is split."""

    lowercase: bool = True
    strip_accents: bool | None = None  # None: where it lower-cases
    ideographs: bool = True  # each a word of its own
    clusters: bool = False  # of scripts without spaces: a letter with its marks is a word of its own


BERT = Spelling()  # the uncased one


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer and what shards say of it."""

    backend: Tokenizer
    kind: Kind
    specials: Specials
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


def load_tokenizer(path: Path, spelling: Spelling = BERT) -> CorpusTokenizer:
    """The tokenizer in directory `path` (tokenizer.json, or BERT's vocab.txt), or of such a file at `path`.

    `spelling` counts only where no file says it. Raises `UserError` for anything an encoder cannot be pretrained with.
    """
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise UserError(f"tokenizer.path={path}: holds neither tokenizer.json nor vocab.txt; name a tokenizer")
        path = found[0]
    elif not path.is_file():
        raise UserError(f"tokenizer.path={path}: no such file or directory; leave it out to train a tokenizer")
    try:
        if path.suffix != ".json":
            return checked(_from_vocabulary(path, spelling), str(path))
        beside = [_object(path.parent / name) for name in (_CONFIG, _SPECIALS_MAP, "config.json")]
        tokenizer = checked(_from_json(path), str(path), beside[:2])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"tokenizer.path={path}: cannot be read ({error}); restore the file") from error
    rows = beside[2].get("vocab_size")
    if isinstance(rows, int) and rows < tokenizer.facts.vocab_size:
        raise UserError(
            f"{path}: its ids go up to {tokenizer.facts.vocab_size - 1:,}, the model beside it has {rows:,} rows "
            "(vocab_size in config.json); take the tokenizer that belongs to it"
        )
    return tokenizer


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file beside a tokenizer says; nothing where it is not there."""
    body = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return body if isinstance(body, dict) else {}


def save_tokenizer(tokenizer: CorpusTokenizer, directory: Path, max_len: int) -> None:
    """Write the files that Hugging Face expects of a tokenizer into the existing `directory`.

    transformers builds a `BertTokenizer` anew from the vocabulary, with BERT's own pre-tokenizer: one with another, or
    of another kind, is therefore not called so, and tokenizer.json alone says what it does.
    """
    normalizer = _settings(tokenizer.backend.normalizer) or {}
    is_bert = tokenizer.kind.name == "wordpiece" and not cuts_clusters(tokenizer.backend)
    config: dict[str, Any] = {"tokenizer_class": "BertTokenizer" if is_bert else "PreTrainedTokenizerFast"}
    config["model_max_length"] = max_len
    if tokenizer.kind.name == "wordpiece":
        config["do_lower_case"] = bool(normalizer.get("lowercase"))
        config["strip_accents"] = normalizer.get("strip_accents")
        config["tokenize_chinese_chars"] = bool(normalizer.get("handle_chinese_chars"))
    *names, inputs = description(tokenizer).items()
    config |= dict(names) if is_bert else dict([*names, inputs])
    vocabulary = tokenizer.vocabulary
    files = {
        "vocab.txt": "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)),
        "tokenizer.json": tokenizer.backend.to_str(pretty=True),
        _CONFIG: json.dumps(config, indent=1),
        _SPECIALS_MAP: json.dumps(dict(names), indent=1),
    }
    if len(vocabulary) < tokenizer.facts.vocab_size or not is_bert:  # a line's number is its id: no file tells of gaps
        del files["vocab.txt"]
    for name, text in files.items():
        (directory / name).write_text(text + "\n", encoding="utf-8")


def description(tokenizer: CorpusTokenizer) -> dict[str, Any]:
    """What tokenizer_config.json is to say of it: the special tokens, and last what a model is given."""
    names = {f"{role}_token": token for role, token in tokenizer.specials._asdict().items() if token}
    types = tokenizer.facts.token_types
    return {**names, "model_input_names": [name for name in _INPUTS if types or name != "token_type_ids"]}


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
    config = _object(path.parent / _CONFIG)
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
        kind_of(model.get("type") if isinstance(model, dict) else None, f"tokenizer.path={path}")
        raise UserError(f"tokenizer.path={path}: {error}; restore the file") from error
    return backend


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


def checked(backend: Tokenizer, name: str, beside: Sequence[Mapping[str, Any]] = ()) -> CorpusTokenizer:
    """Check that an encoder can be pretrained with it, and complete what its kind wants. `name` is for messages.

    `beside` is what tokenizer_config.json and special_tokens_map.json say, if they are there.
    """
    kind = kind_of(type(backend.model).__name__, name)
    backend.no_padding()
    backend.no_truncation()
    specials = kind.specials(backend, given_names(beside), name)
    kind.prepare(backend, specials)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    _refuse_shared_ids(specials, vocabulary, name)
    ids = {f"{role}_id": vocabulary[token or specials.pad] for role, token in specials._asdict().items()}
    layout = kind.layout(backend, name)
    assert layout is not None
    inputs = beside[0].get("model_input_names", _INPUTS) if beside else _INPUTS
    facts = TokenizerFacts(
        fingerprint=_fingerprint(kind, backend, vocabulary),
        vocab_size=max(vocabulary.values()) + 1,
        **ids,
        separators=layout.separators,
        token_types=layout.token_types and "token_type_ids" in inputs,
        never_drawn=tuple(sorted({*kind.never_drawn(backend, vocabulary)} - {*ids.values()})),
    )
    return CorpusTokenizer(backend, kind, specials, facts, vocabulary)


def _refuse_shared_ids(specials: Specials, vocabulary: Mapping[str, int], name: str) -> None:
    named = {role: token for role, token in specials._asdict().items() if token}
    for index, count in Counter(vocabulary[token] for token in named.values()).items():
        if count > 1:
            roles = [f"{role} {token}" for role, token in named.items() if vocabulary[token] == index]
            raise UserError(f"{name}: {' and '.join(roles)} have one id, {index}; give each a token of its own there")


def _fingerprint(kind: Kind, backend: Tokenizer, vocabulary: Mapping[str, int]) -> str:
    """sha256 over everything that decides which ids a text gets, and nothing else (not the layout of a file)."""
    deciding = {
        "vocabulary": sorted(zip(vocabulary.values(), vocabulary, strict=True)),
        "model": kind.deciding(backend, vocabulary),
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
