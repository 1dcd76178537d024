"""Scripts of Unicode: which one a character belongs to, which lose letters to lower-casing, which write no spaces.

What BERT's normalizer does with them is asked of `tokenizers`; knows neither corpora nor configuration.
"""

import unicodedata
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Regex, normalizers, pre_tokenizers

# Scripts whose text has no spaces between words and is not ideographic: BERT would take a line for one word.
UNSPACED_RANGES = (
    *((0x0E00, 0x0E7F), (0x0E80, 0x0EFF)),  # Thai, Lao
    *((0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)),  # Myanmar
    *((0x1780, 0x17D3), (0x17D7, 0x17FF)),  # Khmer
    *(
        (0x1950, 0x197F),
        (0x1980, 0x19DF),
        (0x1A20, 0x1AAF),
        (0xAA80, 0xAADF),
    ),  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    *((0x1B00, 0x1B4B), (0xA980, 0xA9C0)),  # Balinese, Javanese
    *((0x3041, 0x3096), (0x1B000, 0x1B16F)),  # hiragana
    *((0xA000, 0xA48F), (0x17000, 0x18CFF), (0x1B170, 0x1B2FF)),  # Yi, Tangut and Khitan, Nushu
    *((0x12000, 0x1254F), (0x13000, 0x1345F), (0x14400, 0x1467F)),  # cuneiform, Egyptian and Anatolian hieroglyphs
    *((0x2B820, 0x2B91F), (0x2CEB0, 0x2EE5F), (0x30000, 0x323AF)),  # ideographs that BERT does not know as such
)
_KATAKANA = "\u30a1-\u30fa\u30fc\u31f0-\u31ff\uff66-\uff9f"  # runs are words, mostly borrowed ones
_MOST_KATAKANA = 32  # characters in a word

# Alphabets whose marks are accents rather than letters: BERT's uncased models strip them all the same.
ACCENTED = frozenset({"latin", "greek", "cyrillic", "hebrew", "arabic", "syriac", "combining"})
_TWO_WORDS = frozenset({"old", "new", "tai", "canadian", "linear", "meetei", "nyiakeng", "ol", "pau", "khitan"})
_FORMS = frozenset({"fullwidth", "halfwidth"})


class Character(NamedTuple):
    """What a character is to the diagnosis."""

    script: str  # "latin", "thai", "cjk", …: as Unicode's names begin; "" where it is neither letter nor mark
    is_letter: bool
    loses: bool  # stripping accents takes a mark off it, takes it away, or takes it apart


@lru_cache(maxsize=2**16)
def character(letter: str) -> Character:
    """Look one character up in Unicode's tables."""
    category = unicodedata.category(letter)
    if category[0] not in "LM":
        return Character("", False, False)
    words = [word for word in unicodedata.name(letter, "unnamed").lower().split() if word not in _FORMS]
    script = " ".join(words[: 2 if words[0] in _TWO_WORDS else 1])
    parts = unicodedata.normalize("NFD", letter)
    loses = category == "Mn" or any(unicodedata.category(part) == "Mn" for part in parts)
    return Character(script, category[0] == "L", loses or (script == "hangul" and len(parts) > 1))


def is_unspaced(letter: str) -> bool:
    """Whether a character is of a script that writes no spaces, and BERT sees no break beside it."""
    return any(first <= ord(letter) <= last for first, last in UNSPACED_RANGES)


@lru_cache(maxsize=1)
def unspaced_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """BERT's pre-tokenizer, before which scripts without spaces are cut into clusters: a letter and its marks.

    It stands in tokenizer.json, so that every reader of it cuts alike.
    """
    letters = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED_RANGES)
    cluster, katakana = f"[[{letters}]&&[^\\p{{M}}]]\\p{{M}}*", f"[{_KATAKANA}]\\p{{M}}*"
    pattern = Regex(f"{cluster}|{katakana}(?:{katakana}){{0,{_MOST_KATAKANA - 1}}}")
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.BertPreTokenizer()])


def _asked(pieces: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The pieces around whose characters `tokenizers` puts spaces: releases differ in a typing error of the table."""
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False, handle_chinese_chars=True)
    return tuple(
        piece for piece in pieces if all(normalizer.normalize_str(chr(end)) == f" {chr(end)} " for end in piece)
    )


# The ideographs around which BERT puts spaces (Devlin et al. 2019, multilingual model).
IDEOGRAPH_RANGES = _asked(
    (
        *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
        *((0x2B740, 0x2B81F), (0x2B820, 0x2B91F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F)),
    )
)
IDEOGRAPHS = "".join(f"{chr(first)}-{chr(last)}" for first, last in IDEOGRAPH_RANGES)
