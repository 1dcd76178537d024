"""How many sentences of Wikipedia lose words to templates: `python benchmarks/wiki_markup.py pages.xml.bz2`.

A sentence loses words where, in running text, a template that carries text leaves nothing. Templates that are known to
show no prose (notes, sources, pronunciations, maintenance) do not count. "Before" is what removing all templates loses.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from unittest.mock import patch
from xml.etree import ElementTree

from data_prep.sources import wiki, wiki_templates
from data_prep.sources.lines import lines
from data_prep.text.sentences import split_sentences

LOST = "\ue000"  # stands where words were lost


def carries_text(body: str, in_prose: bool) -> bool:
    """Whether a template could show words of its line's sentence."""
    name, *fields = body.split("|")
    given = any(any(map(str.isalnum, field)) and "=" not in field for field in fields) or ":" in name
    return in_prose and "\n" not in body and given and not wiki_templates._NOTHING.match(name.strip())


def marked(shown: Callable[[str, bool], str], missing: Counter[str]) -> Callable[[str, bool], str]:
    def show(body: str, in_prose: bool) -> str:
        text = shown(body, in_prose)
        if text or not carries_text(body, in_prose):
            return text
        missing[body.partition("|")[0].strip()] += 1
        return LOST

    return show


def articles(path: str) -> Iterator[str]:
    page: list[bytes] = []
    for _, _, line, _ in lines(path, 0, 1 << 60):
        page = [line] if b"<page>" in line else [*page, line]
        if b"</page>" in line:
            yield ElementTree.fromstring(b"\n".join(page)).findtext("revision/text") or ""


def main(path: str) -> None:
    """Print both counts, and what is lost still."""
    texts = list(articles(path))
    for when, shown in (("before", lambda body, in_prose: ""), ("now", wiki_templates.shown)):
        missing: Counter[str] = Counter()
        with patch.object(wiki, "shown", marked(shown, missing)):
            sentences = [sentence for text in texts for sentence in split_sentences(wiki.plain_text(text))]
        losing = sum(LOST in sentence for sentence in sentences)
        print(f"{when:8} {losing:,} of {len(sentences):,} sentences lose words; {missing.most_common(8)}")


if __name__ == "__main__":
    main(sys.argv[1])
