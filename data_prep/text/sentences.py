"""Where sentences end: one regular expression, fast enough to cost nothing beside the tokenizer.

A sentence ends at . ! ? or an ellipsis (with closing quotes and brackets) before white space and something that does
not start in lower case (in a text without any capital: whatever follows), at a mark that is nothing but a sentence's
end (。！？ । ؟ ። …, of any script) with or without white space, and at an empty line. A single full stop does not end
one after an initial ("J. R. R."), after an abbreviation that comes before a name or a number ("Dr.", "e.g.", "No. 5"),
or inside a number.

pysbd's rules (cloze[sentences]) can stand in, for one of its two dozen languages, at 1/200 of the speed.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from operator import add

from cloze.errors import UserError

MAX_CHARACTERS = 8192  # a longer sentence is cut: no tokenizer likes a megabyte without a full stop
_PYSBD_CHARACTERS = 10_000  # of a paragraph: longer ones cost pysbd their square

Cut = Callable[[str], Iterable[str]]  # one line of text, with single spaces -> its sentences

# Abbreviations after which a capital or a digit usually goes on with the same sentence.
_ABBREVIATIONS = (
    "Mr Mrs Ms Messrs Dr Drs Prof Rev Hon St Ste Mt Ft Gen Col Maj Capt Cpt Lt Cmdr Sgt Cpl Pvt Adm Gov Sen Rep Pres "
    "Supt Jr Sr Mme Mlle Fr Bros Esq vs cf viz eg ie e.g i.e approx ca al Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov "
    "Dec pp vol vols ed eds trans fig figs Fig Figs eq Eq sec Sec ch Ch Nos nos Vol Vols Ed Art Inc Ltd Co Corp Univ"
)


def _not_abbreviated(capitals: bool) -> str:
    """Look-behinds for the position after a full stop; one per length, since `re` wants fixed widths."""
    by_length: dict[int, list[str]] = {}
    for word in _ABBREVIATIONS.split() if capitals else dict.fromkeys(_ABBREVIATIONS.lower().split()):
        by_length.setdefault(len(word), []).append(re.escape(word))
    initial = r"(?<!\b[A-Z]\.)" if capitals else r"(?<!\b[b-hj-z]\.)"  # "a" and "i" are words
    number = r"(?<!\b[Nn]o\.(?=\ \d))"
    return initial + number + "".join(rf"(?<!\b(?:{'|'.join(words)})\.)" for _, words in sorted(by_length.items()))


# Unicode's Sentence_Terminal (version 17) but for the marks of `_MARKS`, and Tibetan's shad: Python's `unicodedata` has
# no such property. Those beyond 16 bits stand apart: a class that holds them is a list to `re`, four times as slow.
_TERMINALS = (
    "589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 F0D-F12 104A-104B 1362 1367-1368 166E 1735-1736 "
    "17D4-17D5 1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F "
    "2CF9-2CFB 2E2E 2E3C 2E53-2E54 2E60-2E61 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 "
    "AA5D-AA5F AAF0-AAF1 ABEB FE12 FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61"
)
_RARE_TERMINALS = (
    "10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF "
    "11238-11239 1123B-1123C 112A9 113D4-113D5 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 "
    "11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 "
    "16D6E-16D6F 16E98 1BC9F 1DA88"
)


def _as_class(ranges: str) -> str:
    """Hexadecimal code points and ranges of them -> the inside of a character class."""
    borders = ([chr(int(border, 16)) for border in part.split("-")] for part in ranges.split())
    return "".join("-".join(pair) for pair in borders)


_ENDS_CLOSING = (  # quotes and brackets
    "\u201d\u2019\u00bb\u203a)\u300d\u300f\uff09\u300b\u3009\u3011\u3015\uff3d\uff5d\u301e\u301f"
    "\ufe42\ufe44\uff63\uff02\"'"
)
_MARKS = ".!?…\u203c\u203d\u2047-\u2049"
_CLOSING = "\"'\u201d\u2019\u00bb\u203a)\\]*_"
_LOWER = "a-zß-öø-ÿα-ωа-яѐ-џ\u0561-\u0587"  # what goes on with a sentence: Latin, Greek, Cyrillic and Armenian
_GREEK_OR_ARMENIAN = "(?: (?<= [\u0370-\u03ff\u1f00-\u1fff] ; ) | (?<= [\u0561-\u0587] : ) ) (?=[ ]) |"  # ? and .
_RARE_LEADS = bytes([*range(0xCD, 0xD0), *range(0xD4, 0xD7), *range(0xF0, 0xF5)])  # of Greek, Armenian, 17 bits
_ODD_SPACES = b"\t\v\f\r\x1c\x1d\x1e\x1f"  # ASCII's, other than the space and the line feed


@lru_cache
def _boundary(rare: bool, capitals: bool) -> re.Pattern[str]:
    """Ends of sentences, the marks in a group, and the space that follows.

    With the marks of rare scripts or without; in a text that has capitals or in one without.
    """
    ends = _as_class(_TERMINALS + (f" {_RARE_TERMINALS}" if rare else ""))
    return re.compile(  # begins with a set of characters, which `re` looks for at full speed
        rf"""([{_MARKS}{ends}{";:" * rare}]
        (?: (?<=[{ends}]) (?<! \d \uff0e (?=\d) ) (?: [ ]? [{ends}] | [{_ENDS_CLOSING}] )*+
          | {_GREEK_OR_ARMENIAN if rare else ""}
            (?<![{_MARKS}][{_MARKS}])  # from the first mark of a run only: a megabyte of dots must not cost its square
            (?<=[{_MARKS}])
            (?: [{_MARKS}]++ | (?<=[^.]) | (?=["\u201d]) | {_not_abbreviated(capitals)} )
            [{_CLOSING}]*+ (?= [ ] (?! [{_LOWER if capitals else ""},;] | \.[ ] ) )
        )) [ ]?""",
        re.VERBOSE,
    )


_PARAGRAPH = re.compile(r"\n\s*\n")


def _by_rules(line: str, boundary: re.Pattern[str] | None = None) -> list[str]:
    parts = (boundary or _boundary(rare=True, capitals=True)).split(line)
    sentences = [*map(add, parts[::2], parts[1::2])]  # each text and its marks
    if parts[-1]:
        sentences.append(parts[-1])
    return sentences


@lru_cache
def _rules_for(rare: bool, capitals: bool) -> Cut:
    return partial(_by_rules, boundary=_boundary(rare, capitals))


def _whole(line: str) -> Iterable[str]:
    return (line,) if line else ()


def split_sentences(text: str, cut: Cut = _by_rules) -> list[str]:
    """Sentences of `text` in order, none empty, at most MAX_CHARACTERS characters each, white space made single spaces.

    Nothing but white space is lost: the sentences joined are the text again, up to white space.
    """
    is_ascii, data = text.isascii(), text.encode(errors="surrogatepass")
    is_plain = is_ascii and _lacks(data, _ODD_SPACES)
    if cut is _by_rules:
        cut = _rules_for(not is_ascii and not _lacks(data, _RARE_LEADS), not text.islower())
    sentences: list[str] = []
    for paragraph in text.split("\n") if cut is _whole else _PARAGRAPH.split(text):
        line = paragraph.strip()
        # Line breaks, tabs and other spaces are not printable; where they can only be line breaks, to look is quicker.
        if "  " in line or (("\n" in line) if is_plain else not line.isprintable()):
            line = " ".join(line.split())
        if len(line) <= MAX_CHARACTERS:
            sentences += cut(line)
            continue
        for sentence in cut(line):
            _add(sentences, sentence)
    return sentences


def _lacks(data: bytes, some: bytes) -> bool:
    """Whether none of some bytes comes: several times as fast as a regular expression."""
    return len(data.translate(None, some)) == len(data)


@lru_cache(maxsize=4)
def cut_by(rules: str, language: str) -> Cut:
    """How to cut: by `rules` of our own, at every end of a line ("lines"), or by "pysbd"'s rules of a language.

    Raises `UserError` without pysbd, or for a language that it does not know.
    """
    if rules == "lines":
        return _whole
    if rules != "pysbd":
        return _by_rules
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that newer Pythons frown at
            import pysbd
        segment = pysbd.Segmenter(language=language, clean=False).segment
    except ImportError:
        raise UserError("sentences=pysbd: needs pysbd: pip install 'cloze[sentences]'") from None
    except ValueError as error:
        raise UserError(f"language={language}: pysbd has no rules for it ({error})") from error

    def cut(line: str) -> Iterable[str]:
        if len(line) <= _PYSBD_CHARACTERS:
            found = [sentence.strip() for sentence in segment(line)]
            if "".join(found).replace(" ", "") == line.replace(" ", ""):  # some texts it loses parts of
                return filter(None, found)
        return _by_rules(line)

    return cut


def _add(sentences: list[str], sentence: str) -> None:
    start = 0  # not cut off the front each time: of 64 MiB without a stop that would cost the square
    while len(sentence) - start > MAX_CHARACTERS:
        end = start + MAX_CHARACTERS
        end = sentence.rfind(" ", start + MAX_CHARACTERS // 2, end) + 1 or end
        sentences.append(sentence[start:end].rstrip())
        start = end
    sentences.append(sentence[start:])
