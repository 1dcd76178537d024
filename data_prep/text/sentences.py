"""Where sentences end: one regular expression, fast enough to cost nothing beside the tokenizer.

A sentence ends at . ! ? or an ellipsis (with closing quotes and brackets) before white space and something that does
not start in lower case, at 。！？ with or without white space, and at an empty line. A single full stop does not end
one after an initial ("J. R. R."), after an abbreviation that comes before a name or a number ("Dr.", "e.g.", "No. 5"),
or inside a number.

pysbd's rules (cloze[sentences]) can stand in, for one of its two dozen languages, at 1/200 of the speed.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from cloze.errors import UserError

MAX_CHARACTERS = 8192  # a longer sentence is cut: no tokenizer likes a megabyte without a full stop
_PYSBD_CHARACTERS = 10_000  # of a paragraph: longer ones cost pysbd their square

Cut = Callable[[str], Iterable[str]]  # one line of text -> its sentences

# Abbreviations after which a capital or a digit usually goes on with the same sentence.
_ABBREVIATIONS = (
    "Mr Mrs Ms Messrs Dr Drs Prof Rev Hon St Ste Mt Ft Gen Col Maj Capt Cpt Lt Cmdr Sgt Cpl Pvt Adm Gov Sen Rep Pres "
    "Supt Jr Sr Mme Mlle Fr Bros Esq vs cf viz eg ie e.g i.e approx ca al Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov "
    "Dec pp vol vols ed eds trans fig figs Fig Figs eq Eq sec Sec ch Ch Nos nos Vol Vols Ed Art Inc Ltd Co Corp Univ"
)


def _not_abbreviated() -> str:
    """Look-behinds for the position after a full stop; one per length, since `re` wants fixed widths."""
    by_length: dict[int, list[str]] = {}
    for word in _ABBREVIATIONS.split():
        by_length.setdefault(len(word), []).append(re.escape(word))
    initial, number = r"(?<!\b[A-Z]\.)", r"(?<!\b[Nn]o\.(?=\ \d))"
    return initial + number + "".join(rf"(?<!\b(?:{'|'.join(words)})\.)" for _, words in sorted(by_length.items()))


_WIDE = "\u3002\uff01\uff1f\uff61"  # the ideographic full stop, ! and ?, and the half-width full stop
_WIDE_CLOSING = "\u201d\u2019\u300d\u300f\uff09\u300b\"'"
_CLOSING = "\"'\u201d\u2019\u00bb)\\]*_"
_BOUNDARY = re.compile(  # begins with a set of characters, which `re` looks for at full speed
    rf"""[.!?…{_WIDE}]
    (?: (?<=[{_WIDE}]) [{_WIDE}{_WIDE_CLOSING}]*+
      | (?<![.!?…][.!?…])  # from the first mark of a run only: a megabyte of dots must not cost its square
        (?: [.!?…]++ | (?<=[!?…]) | (?=["\u201d]) | {_not_abbreviated()} )
        [{_CLOSING}]*+ (?= [ ] (?! [a-zß-öø-ÿα-ωа-я,;] | \.[ ] ) )
    )""",
    re.VERBOSE,
)
_PARAGRAPH = re.compile(r"\n\s*\n")


def _by_rules(line: str) -> Iterator[str]:
    start = 0
    for match in _BOUNDARY.finditer(line):
        end = match.end()
        yield line[start:end]
        start = end + 1 if line[end : end + 1] == " " else end
    if start < len(line):
        yield line[start:]


def split_sentences(text: str, cut: Cut = _by_rules) -> list[str]:
    """Sentences of `text` in order, none empty, at most MAX_CHARACTERS characters each, white space made single spaces.

    Nothing but white space is lost: the sentences joined are the text again, up to white space.
    """
    sentences: list[str] = []
    for paragraph in _PARAGRAPH.split(text):
        line = paragraph.strip()
        if "  " in line or not line.isprintable():  # line breaks, tabs and other spaces are not printable
            line = " ".join(line.split())
        if len(line) <= MAX_CHARACTERS:
            sentences += cut(line)
            continue
        for sentence in cut(line):
            _add(sentences, sentence)
    return sentences


@lru_cache(maxsize=1)
def cut_by(rules: str, language: str) -> Cut:
    """How to cut a line: by `rules` of our own, or by "pysbd"'s of a language. Raises `UserError` without pysbd."""
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
