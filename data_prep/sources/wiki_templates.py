"""What a reader sees of a template in running text, as far as it can be told without the wiki. Pure.

A rule for many comes before names for few: in running text, a template of one text shows it ({{nowrap|x}}), one of a
language and a text shows the text ({{lang|ja|京都}}), one of a number and a unit shows both ({{unité|5|km}}). Names are
known of those that show something else, and of those that show nothing, or nothing that is prose (notes, sources,
pronunciations, maintenance).
"""

import re
from collections.abc import Callable, Mapping, Sequence

_LONGEST = 4000  # characters of a template that may be prose; infoboxes and navigation are longer
_NOTHING = re.compile(
    r"(?:cit[ea]|sfn|harv|ref|rp?$|efn|note|ipa|respell|audio|listen|pron|coord|main|see|further|for$|about|redirect|"
    r"hatnote|distinguish|other|infobox|nav|portal|commons|wikiquote|wiktionary|sister|use |short|default|authority|"
    r"dead|webarchive|cbignore|clar|fact|cn$|when|who|which|by whom|why|dubious|vague|accord|page|verify|fail|better|"
    r"orig|flagicon|isbn|issn|doi|oclc|dts|sort|anchor|clear|toc|multiple|unref|refimp|.*stub|image|wide|gallery|color|"
    r"internetquelle|literatur|subscription|official|google books|birth|death|age|start|end|s-|pp-|#|update|needs?\b|"
    r".*needed|increase|decrease|steady|webcite|tl[xc]?$|efn)",
    re.IGNORECASE,
)
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-\w{2,8})*")
_NUMBER = re.compile("[-\u2212+]?[\\d.,]*\\d")
_UNIT = re.compile(r"[^\W\d]{1,12}[²³2-3]?(?:[/·.]\w{1,4}[²³2-3]?)*|[%‰°]\w?")
_BETWEEN = {"-": "\u2013", "\u2013": "\u2013", "x": "\u00d7", "xx": "\u00d7", "+/-": "\u00b1"}
_BETWEEN |= {word: word for word in ("to", "and", "by", "or")}
_SHIPS = ["uss", "hms", "hmas", "hmcs", "hmnzs", "rms", "ss", "mv", "ms", "sms", "usns", "uscgc", "gts", "ins", "jds"]
_MONEY = {"us$": "US$", "usd": "US$", "a$": "A$", "aud": "A$", "c$": "C$", "cad": "C$", "gbp": "£", "inr": "₹",
          "eur": "€", "euro": "€", "cny": "CN¥", "jpy": "¥", "yen": "¥", "rmb": "CN¥"}  # fmt: skip
_MARKS = {
    **dict.fromkeys(("nbsp", "space", "spaces"), " "),
    **dict.fromkeys(("snd", "spnd", "spaced ndash", "spaced en dash"), " \u2013 "),
    **dict.fromkeys(("ndash", "en dash"), "\u2013"),
    **dict.fromkeys(("mdash", "em dash"), "\u2014"),
    **dict.fromkeys(("dot", "\u00b7"), " \u00b7 "),
    **dict.fromkeys(("lrm", "rlm", "shy"), ""),
    "'": "'",
    "-'": "'",
    "'s": "'s",
    "=": "=",
    "zwj": "\u200d",
    "zwnj": "\u200c",
}

Show = Callable[[Sequence[str], Mapping[str, str]], str]


def _convert(given: Sequence[str], _: Mapping[str, str]) -> str:
    if len(given) > 3 and given[1] in _BETWEEN:
        return f"{given[0]} {_BETWEEN[given[1]]} {given[2]} {given[3]}"
    return " ".join(given[:2])


def _nihongo(given: Sequence[str], _: Mapping[str, str]) -> str:
    first, *others = [*given[:3], ""][:4]
    inside = ", ".join(filter(None, others))
    return f"{first} ({inside})" if first and inside else first or inside


def _fraction(given: Sequence[str], _: Mapping[str, str]) -> str:
    whole, parts = (given[0] + " ", given[1:]) if len(given) == 3 else ("", given)
    return whole + "/".join(parts[:2])


def _as_of(given: Sequence[str], named: Mapping[str, str]) -> str:
    if "alt" in named:
        return named["alt"]
    return f"{'as' if named.get('lc') else 'As'} of {' '.join(reversed(given[:3]))}"


def _first(given: Sequence[str], _: Mapping[str, str]) -> str:
    return given[0] if given else ""


def _last(given: Sequence[str], _: Mapping[str, str]) -> str:
    return given[-1] if given else ""


def _quote(given: Sequence[str], named: Mapping[str, str]) -> str:
    return named.get("text") or named.get("quote") or _first(given, named)


def _value(given: Sequence[str], named: Mapping[str, str]) -> str:
    unit = named.get("u") or named.get("ul") or ""
    return f"{_first(given, named)} {unit}".strip()


def _chinese(_: Sequence[str], named: Mapping[str, str]) -> str:
    return ", ".join(named[key] for key in ("c", "t", "s", "p") if named.get(key))


_SHOWN: dict[str, Show] = {
    **dict.fromkeys(("convert", "cvt"), _convert),
    **dict.fromkeys(("nihongo", "nihongo2", "nihongo3", "nihongo krt"), _nihongo),
    **dict.fromkeys(("frac", "sfrac", "fraction"), _fraction),
    **dict.fromkeys(
        ("quote", "blockquote", "cquote", "quotation", "zitat", "citation bloc", "verse translation"), _quote
    ),
    **dict.fromkeys(("transl", "transliteration", "lang", "langx", "wikt-lang"), _last),
    **dict.fromkeys(
        ("abbr", "tooltip", "ill", "interlanguage link", "flag", "ruby", "ruby-ja", "mvar", "math"), _first
    ),
    **dict.fromkeys(("circa", "c.", "ca."), lambda given, named: f"c. {_first(given, named)}"),
    **dict.fromkeys(("chem", "chem2"), lambda given, _: "".join(given)),
    "as of": _as_of,
    "val": _value,
    "zh": _chinese,
    "ship": lambda given, _: " ".join(filter(None, given[:2])),
    "url": lambda given, _: given[1] if len(given) > 1 else "",
}
_CASES: dict[str, Callable[[str], str]] = {
    "formatnum": str, "lc": str.lower, "uc": str.upper,
    "lcfirst": lambda text: text[:1].lower() + text[1:], "ucfirst": lambda text: text[:1].upper() + text[1:],
}  # fmt: skip


def shown(body: str, in_prose: bool) -> str:
    """What is seen of the template `{{body}}`; `in_prose` says whether other words stand in its line."""
    if len(body) > _LONGEST:
        return ""
    name, *fields = _fields(body)
    name = name.strip().replace("_", " ").lower().removeprefix("subst:").removeprefix("safesubst:")
    function, colon, _ = name.partition(":")
    if colon and function in _CASES:
        return _CASES[function](body.partition(":")[2].partition("|")[0].strip())
    if name in _MARKS:
        return _MARKS[name]
    given = [field.strip() for field in fields if not _is_named(field)]
    named = {
        key.strip(): text.strip() for key, _, text in (field.partition("=") for field in fields if _is_named(field))
    }
    given = [named[str(i)] for i in range(1, 10) if str(i) in named] or given
    if name in _SHOWN:
        return _SHOWN[name](given, named)
    if _NOTHING.match(name) or not in_prose or "\n" in body or not given:
        return ""
    if name in _SHIPS:
        return f"{name.upper()} {given[0]}"
    if name in _MONEY:
        return _MONEY[name] + given[0]
    given = [text for text in given if text]
    if len(given) == 2 and _LANGUAGE.fullmatch(given[0]):
        return given[1]
    if len(given) == 2 and _NUMBER.fullmatch(given[0]) and _UNIT.fullmatch(given[1]):
        return f"{given[0]} {given[1]}"
    return given[0] if len(given) == 1 and any(map(str.isalnum, given[0])) else ""


def _fields(body: str) -> list[str]:
    """Between pipes, but for those in links."""
    if "[[" not in body:
        return body.split("|")
    fields, depth = [""], 0
    for part in re.split(r"(\[\[|\]\]|\|)", body):
        depth += (part == "[[") - (part == "]]")
        if part == "|" and depth <= 0:
            fields.append("")
        else:
            fields[-1] += part
    return fields


def _is_named(field: str) -> bool:
    key, equals, _ = field.partition("=")
    return bool(equals) and not any(mark in key for mark in "<[{&")
