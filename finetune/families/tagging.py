"""A tag for each word (named entities): a linear head or a conditional random field, scored by whole entities.

Files are CoNLL's: a word and its tag to a line, a blank line between sentences. Shapes: N sentences, T tokens, L tags.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError
from cloze.log import log
from finetune.data import (
    BadRow,
    Dataset,
    both_sets,
    label_names,
    more_sets,
    named_label,
    require_known,
    require_two,
    tell_cut,
)
from finetune.keys import DataConfig, Head, Init
from finetune.predictor import Encoded, Predictor, Trained, chosen, empty, pieces, strings_of, text_of
from finetune.readers import Columns, Row, is_json, json_rows
from finetune.tasks import IGNORED, EvaluationSet, Family, Prepared, Scores, Task, TaskConfig

_LAYOUTS = tuple((words, tags) for words in ("words", "tokens") for tags in ("tags", "ner_tags", "labels"))
_WORDS = ("words", "tokens")  # columns of lists, where they are asked about
_TAG = re.compile(r"O|[BIES]-.+")
_BARE = re.compile(r"(?!O$)[A-Za-z]+")  # PER, of a scheme that does not tell where entities begin
_NUMBER = re.compile(r"\d+([-.]\d+)?")  # 3, and CoNLL-U's 3-4 and 3.1
_GAPS = re.compile("[ \t]+")  # not all white space: U+3000 may be a word

Entity = tuple[str, int, int]  # type, first word, word after the last
_Tagger = Callable[[npt.NDArray[np.float32]], list[str]]  # of the emissions of a sentence's words: [W, L]


class Sentence(NamedTuple):
    words: tuple[str, ...]
    tags: tuple[str, ...]


class _Conll:
    """How the lines of a file are cut into columns."""

    def __init__(self, text: str, columns: Sequence[str] | None) -> None:
        every = [line for line in text.split("\n") if line.strip()]
        self._tabs = 2 * sum("\t" in line for line in every) >= len(every)
        lines = [line for line in every if not self.is_gap(line) and not self.is_comment(line)]
        counts = Counter(len(self._cells(line)) for line in lines)
        self.width = max(counts, key=lambda width: counts[width], default=0)
        self._word, self._tag = 0, -1
        if columns is not None:
            numbers = [int(name) for name in columns if name.isdecimal() and 1 <= int(name) <= self.width]
            if len(columns) != 2 or len(numbers) != 2:
                raise UserError(
                    f"data.columns=[{','.join(columns)}]: two numbers from 1 to {self.width} are needed: which column "
                    "has the words, and which the tags"
                )
            self._word, self._tag = numbers[0] - 1, numbers[1] - 1

    def _cells(self, line: str) -> list[str]:
        return line.rstrip().split("\t") if self._tabs else _GAPS.split(line.strip(" \t"))

    def is_gap(self, line: str) -> bool:
        """Whether it ends a sentence."""
        return not line.strip() or self._cells(line)[0] == "-DOCSTART-"

    def is_comment(self, line: str) -> bool:
        """`# sent_id = 1`, but not the word `#` with its tag."""
        return line.startswith("#") and not _TAG.fullmatch(self._cells(line)[-1].strip())

    def row(self, lines: Sequence[tuple[int, str]]) -> Row:
        """One sentence, of lines with their numbers."""
        words, tags = [], []
        for number, line in lines:
            cells = self._cells(line)
            if len(cells) < 2 or not cells[0]:
                return Row(f"line {number}", {}, f"{line.strip()!r}: a word and its tag are needed, apart by a tab")
            if len(cells) != self.width:
                return Row(f"line {number}", {}, f"{len(cells)} columns where most lines have {self.width}")
            words.append(cells[self._word])
            tags.append(cells[self._tag].strip())
        numbers = [number for number, _ in lines]
        return Row(f"line {numbers[0]}", {"words": words, "tags": tags, "lines": numbers})


def conll_rows(text: str, path: str, columns: Columns) -> list[Row]:
    """A row for each sentence, with its `words`, its `tags` and their `lines`: the first column and the last.

    Raises `UserError` where the first column only numbers the words, and data.columns does not say which one has them.
    """
    if is_json(path):
        return json_rows(text, columns.named or ())
    if (piped := _piped_rows(text)) is not None:
        return piped
    conll = _Conll(text, columns.named)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if not conll.is_comment(line)]
    blocks = groupby(lines, key=lambda numbered: conll.is_gap(numbered[1]))
    rows = [conll.row(list(block)) for is_gap, block in blocks if not is_gap]
    firsts = [row.columns["words"] for row in rows if not row.fault]
    numbered = all(map(_NUMBER.fullmatch, (word for words in firsts for word in words)))
    if conll.width > 2 and columns.named is None and numbered and any(len(words) > 1 for words in firsts):
        raise UserError("the first column numbers the words; data.columns=[2,3] says where words and tags are")
    return rows


def _piped_rows(text: str) -> list[Row] | None:
    """Of WikiNER's layout: a sentence on each line, of word|part of speech|tag; None for another."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        cells = [token.split("|") for token in _GAPS.split(line.strip(" \t")) if token]
        if not cells:
            continue
        if len(cells[0]) < 2 or not _TAG.fullmatch(cells[0][-1]):
            return None
        whole = [cell for cell in cells if len(cell) > 1 and cell[0]]
        fault = None if len(whole) == len(cells) else "a token is not word|tag"
        words, tags = (
            ["|".join(cell[: max(1, len(cell) - len(cells[0]) + 1)]) for cell in whole],
            [cell[-1] for cell in whole],
        )
        rows.append(Row(f"line {number}", {} if fault else {"words": words, "tags": tags}, fault))
    return rows or None


def sentences(dataset: Dataset, config: DataConfig, known: Collection[str] | None = None) -> list[Sentence]:
    """Words and tags; `UserError` for the first tag that breaks the scheme: BIO or, where E or S occur, BIOES.

    So is one for a tag that is not among those `known`.

    With `repair_tags`, entities that do not begin or end as they should are spelled anew, as `entities` reads them.
    """
    layout = _layout(dataset, config)
    every = (tag for row in dataset.rows if not row.fault for tag in row.columns.get(layout[1]) or ())
    closed = any(str(tag)[:2] in ("E-", "S-") for tag in [*every, *(config.labels or ())])
    num_repaired = 0

    def parse(row: Row) -> Sentence:
        nonlocal num_repaired
        words, tags = _lists(row, layout, config.labels)
        if config.repair_tags and any(_tag_fault(a, b, closed) for a, b in pairwise(["O", *tags, "O"])):
            inside = [f"I-{tag}" if _BARE.fullmatch(tag) else tag for tag in tags]
            if all(map(_TAG.fullmatch, inside)):
                tags = _spelled(entities(inside), len(tags), closed)
                num_repaired += 1
        for number, (before, tag) in enumerate(pairwise(["O", *tags, "O"])):
            lines = row.columns.get("lines")
            place = f"{dataset.name}: " + (f"line {[*lines, lines[-1] + 1][number]}" if lines else row.place)
            if fault := _tag_fault(before, tag, closed):
                remedy = "; or repair all such by data.repair_tags=true" * bool(
                    _TAG.fullmatch(tag) or _BARE.fullmatch(tag)
                )
                raise UserError(f"{place}: {fault}{remedy}")
            if number < len(tags):
                require_known(tag, known, place)
        return Sentence(tuple(words), tuple(tags))

    found = dataset.convert(parse)
    if num_repaired:
        log.info(f"{dataset.name}: the tags of {num_repaired} of {len(dataset.rows)} sentences were repaired")
    return found


def _layout(dataset: Dataset, config: DataConfig) -> tuple[str, str]:
    """Names of the columns of words and tags. Raises `UserError` where there are none such."""
    whole = next((row for row in dataset.rows if not row.fault), dataset.rows[0])
    there = whole.columns.keys()
    own = [(config.columns[0], config.columns[1])] if config.columns and len(config.columns) == 2 else []
    found = next((names for names in (*own, *_LAYOUTS) if {*names} <= there), None)
    if found is None and not whole.fault:
        raise UserError(
            f"{dataset.name}: {whole.place}: lists of words (words, tokens) and of tags (tags, ner_tags, labels) are "
            f"needed, there are {', '.join(there)}; data.columns=[WORDS,TAGS] names others, or name a file of CoNLL's"
        )
    return found or _LAYOUTS[0]


def _lists(row: Row, layout: tuple[str, str], names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Words and tags of a row, tags that are numbers by their `names`. Raises `BadRow`."""
    words, tags = (row.columns.get(name) for name in layout)
    if not isinstance(words, list) or not isinstance(tags, list) or not words:
        raise BadRow(f"{layout[0]} and {layout[1]} must be lists of words and tags")
    if len(words) != len(tags):
        raise BadRow(f"{len(words)} words and {len(tags)} tags")
    if names is None and any(isinstance(tag, int) for tag in tags):
        raise BadRow(f"{layout[1]} has numbers; data.labels=[O,B-PER,…] tells their names, in order from 0")
    return [str(word) for word in words], [named_label(str(tag), names) for tag in tags]


def _words(row: Row, columns: Columns) -> Any:
    own = columns.named[:1] if columns.named else ()
    return next((row.columns[name] for name in (*own, "words", "tokens") if name in row.columns), row.columns)


def entities(tags: Sequence[str]) -> set[Entity]:
    """Entities of BIO or BIOES tags; of a model's faulty ones as CoNLL's script has it: a new type begins an entity."""
    found, start, kind, ended = set(), 0, "", True
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, new = tag.partition("-")
        if kind and (ended or prefix in "BSO" or new != kind):
            found.add((kind, start, i))
            kind = ""
        if prefix != "O" and not kind:
            start, kind = i, new
        ended = prefix in "ES"
    return found


def _spelled(found: set[Entity], num_words: int, closed: bool) -> list[str]:
    tags = ["O"] * num_words
    for kind, start, end in found:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
        if closed:
            tags[end - 1] = f"{'S' if end == start + 1 else 'E'}-{kind}"
    return tags


def _tag_fault(before: str, tag: str, closed: bool) -> str | None:
    prefix, _, kind = tag.partition("-")
    scheme = "BIOES" if closed else "BIO"
    if tag != "O" and (prefix == "O" or prefix not in {*scheme} or not kind):
        return f"tag {tag!r}: O, or one of {', '.join(f'{p}-TYPE' for p in scheme if p != 'O')} is needed"
    inside = before[:1] in ("B", "I")  # an entity of `before` may go on, and under BIOES must
    continues = prefix in ("I", "E")
    if continues and not (inside and before[2:] == kind):
        return f"{tag} after {before}: an entity begins with B-{kind}" + (f" or S-{kind}" if closed else "")
    if closed and inside and not continues:
        return f"{before} is not followed by I-{before[2:]} or E-{before[2:]}"
    return None


def load_tagger(folder: Path | str) -> Any:
    """A written model, with its `crf` if it has one: `model.crf.best(logits of the words' first pieces)`."""
    from transformers import AutoModelForTokenClassification

    from finetune.techniques.crf import crf_of, weights_of
    from pretrain.export.hugging_face import load_pretrained

    folder = Path(folder)
    model = load_pretrained(AutoModelForTokenClassification, folder, purpose="a tagger")
    if weights_of(folder):
        model.crf = crf_of(folder, model.config.num_labels)
    return model


def predictor(trained: Trained, first: Row) -> Predictor:
    """Words in a list are given their tags; of a text, the entities that stand in it."""
    from finetune.techniques.crf import crf_of, weights_of

    layouts = trained.layouts or (*((name,) for name in _WORDS), ("text",), ("sentence",))
    (column,) = chosen(layouts, first)
    crf = crf_of(trained.folder, len(trained.labels)) if weights_of(trained.folder) else None

    def tags(emissions_WL: npt.NDArray[np.float32]) -> list[str]:
        import torch

        best = emissions_WL.argmax(-1) if crf is None else crf.best(torch.as_tensor(emissions_WL))
        return [trained.labels[number] for number in best]

    encode = _encoded_words if isinstance(first.columns[column], list) else _encoded_text
    return Predictor(
        auto_class="AutoModelForTokenClassification",
        adds=("prediction",),
        encode=lambda rows: encode(rows, column, trained, tags),
    )


def _encoded_words(rows: Sequence[Row], column: str, trained: Trained, tags: _Tagger) -> Encoded:
    """As in training; the tag of a word beyond max_len is O."""
    words = [strings_of(row, column) for row in rows]
    owners = [number for number, own in enumerate(words) if own]
    dataset = [Sentence(tuple(words[number]), ("",) * len(words[number])) for number in owners]
    features, kept = _encoded(dataset, {"": 0}, trained.tokenizer, trained.max_len, None) if dataset else ([], [])
    firsts = [np.flatnonzero(np.asarray(feature.pop("labels")) != IGNORED) for feature in features]

    def answers(found: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        predicted = [["O"] * len(own) for own in words]
        for owner, places, own in zip(owners, kept, found, strict=True):
            for place, tag in zip(places, own, strict=True):
                predicted[owner][place] = tag
        return [{"prediction": own} for own in predicted]

    return Encoded(
        features,
        lambda number, outputs: tags(outputs[0][firsts[number]]) if len(firsts[number]) else [],
        answers,
        cut=[
            owner
            for owner, feature, own in zip(owners, features, kept, strict=True)
            if len(feature["input_ids"]) == trained.max_len and own[-1:] != [len(words[owner]) - 1]
        ],
        empty=[number for number, own in enumerate(words) if not own],
    )


def _encoded_text(rows: Sequence[Row], column: str, trained: Trained, tags: _Tagger) -> Encoded:
    """Words are those of the tokenizer: of BERT's, what is between blanks and punctuation, and single ideographs."""
    found = [text_of(row, column) for row in rows]
    features, encodings = pieces(found, trained, with_offsets=True)
    spans = [_word_spans(text, one.word_ids, one.offsets) for text, one in zip(found, encodings, strict=True)]

    def entities_in(number: int, outputs: Any) -> list[dict[str, Any]]:
        text, own = found[number], spans[number]
        if not own:
            return []
        predicted = entities(tags(outputs[0][[piece for piece, _, _ in own]]))
        places = sorted((own[first][1], own[after - 1][2], kind) for kind, first, after in predicted)
        return [{"type": kind, "start": start, "end": end, "text": text[start:end]} for start, end, kind in places]

    return Encoded(
        features,
        entities_in,
        lambda each: [{"prediction": own} for own in each],
        cut=[number for number, one in enumerate(encodings) if one.overflowing],
        empty=empty([(text,) for text in found]),
    )


def _word_spans(
    text: str, words: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """Of each word: its first piece, and where it begins and ends in the text, without blanks around it."""
    spans: list[tuple[int, int, int]] = []
    before = None
    for piece, (word, (start, end)) in enumerate(zip(words, offsets, strict=True)):
        if word is not None and word == before:
            spans[-1] = (*spans[-1][:2], end)
        elif word is not None:
            start += len(text[start:end]) - len(text[start:end].lstrip())
            spans.append((piece, start, end))
        before = word
    return spans


def conll_stream(lines: Iterable[str], columns: Sequence[str]) -> Iterator[Row]:
    """A row for each sentence of a file of any size: its `words`, `columnN` for the others, `comments` above it.

    `columns` numbers that of the words, from 1, and perhaps that of the tags, which need not be there.
    """
    if not all(name.isdecimal() and int(name) for name in columns):
        raise UserError(f"columns=[{','.join(columns)}]: the number of the words' column is needed, from 1")
    word = int(columns[0]) if columns else 1
    is_first = True
    for number, comments, cells in _conll_sentences(lines):
        by_column = [list(column) for column in zip(*cells, strict=True)]
        if len(by_column) < word:
            raise UserError(f"line {number}: {len(by_column)} columns, and words in column {word}; set columns")
        is_numbered = all(map(_NUMBER.fullmatch, by_column[0]))
        if is_first and is_numbered and not columns and len(by_column) > 1 < len(cells):
            raise UserError("the first column numbers the words; columns=[2] says where the words are")
        is_first = False
        own = {"words" if n == word else f"column{n}": column for n, column in enumerate(by_column, 1)}
        yield Row(f"line {number}", {**own, **({"comments": comments} if comments else {})})


def _conll_sentences(lines: Iterable[str]) -> Iterator[tuple[int, list[str], list[list[str]]]]:
    """The number of its first line, the comments above it and the cells of each sentence."""
    comments: list[str] = []
    cells: list[list[str]] = []
    for number, line in enumerate(itertools.chain(lines, [""]), 1):
        own = line.split("\t") if "\t" in line else _GAPS.split(line.strip(" "))
        is_comment = not cells and len(own) > 1 and line.startswith("#") and not _TAG.fullmatch(own[-1].strip())
        if not line.strip() or own[0] == "-DOCSTART-" or is_comment:
            if cells:
                yield number - len(cells), comments, cells
                comments, cells = [], []
            if line.strip():
                comments.append(line)
        elif cells and len(own) != len(cells[0]):
            raise UserError(f"line {number}: {len(own)} columns where the line before has {len(cells[0])}; mend it")
        else:
            cells.append(own)


def prepare(config: TaskConfig) -> Prepared:
    """Shapes of predictions: [N, T, L] emissions; a word is judged by its first piece, one that was cut off is "O"."""
    from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

    from finetune.models import load_encoder_tokenizer, load_model, load_teacher
    from finetune.techniques.crf import crf_of

    train_set, dev_set = both_sets(config)
    train = sentences(train_set, config.data)
    tags = [tag for s in train for tag in s.tags]
    require_two(train_set, tags, "there is nothing to learn")
    names = label_names(train_set, _with_siblings(tags), config)
    known = {*names}
    dev = sentences(dev_set, config.data, known)
    more = {name: sentences(dataset, config.data, known) for name, dataset in more_sets(config).items()}
    require_two(dev_set, [tag for s in dev for tag in s.tags], "scores would say nothing")
    tokenizer = load_encoder_tokenizer(config, split_into_words=True)
    ids = {name: number for number, name in enumerate(names)}
    train_features, _ = _encoded(train, ids, tokenizer, config.max_len, train_set.name)

    def make_model() -> Any:
        model = load_model(config, AutoModelForTokenClassification, names)
        if config.head is Head.crf:
            model.crf = crf_of(Path(config.model) if config.init is Init.pretrained else None, len(names))
        return model

    def questioned(dataset: Sequence[Sentence], name: str) -> EvaluationSet:
        return _evaluation_set(dataset, names, _encoded(dataset, ids, tokenizer, config.max_len, name))

    return Prepared(
        tokenizer=tokenizer,
        make_model=make_model,
        train=train_features,
        dev=questioned(dev, dev_set.name),
        more={name: questioned(dataset, f"data.{name}") for name, dataset in more.items()},
        collate=DataCollatorForTokenClassification(tokenizer),
        num_labels=len(names),
        teacher=load_teacher(config, AutoModelForTokenClassification, names, tokenizer),
        facts={"labels": names, "head": config.head.value},
    )


def _with_siblings(tags: Sequence[str]) -> list[str]:
    """With I-LOC where B-LOC is there: a type that is known in one word may have two in data.dev."""
    prefixes = "BIES" if any(tag[:2] in ("E-", "S-") for tag in tags) else "BI"
    kinds = dict.fromkeys(tag[2:] for tag in tags if tag != "O")
    return [*tags, *(f"{prefix}-{kind}" for kind in kinds for prefix in prefixes)]


def _evaluation_set(
    dataset: Sequence[Sentence], names: Sequence[str], encoded: tuple[list[dict[str, Any]], list[list[int]]]
) -> EvaluationSet:
    """Answers are the tags of all words; guessed is the commonest one everywhere."""
    import torch

    gold, (features, all_words) = [s.tags for s in dataset], encoded

    def decide(emissions_NTL: npt.NDArray[np.float32], model: Any) -> list[list[str]]:
        predicted = []
        for emissions_TL, feature, words, tags in zip(emissions_NTL, features, all_words, gold, strict=True):
            guessed = ["O"] * len(tags)
            if words:
                own_TL = emissions_TL[: len(feature["labels"])][np.asarray(feature["labels"]) != IGNORED]
                crf = getattr(model, "crf", None)
                chosen = (
                    own_TL.argmax(-1) if crf is None else crf.best(torch.as_tensor(own_TL, device=crf.start.device))
                )
                for word, number in zip(words, chosen, strict=True):
                    guessed[word] = names[number]
            predicted.append(guessed)
        return predicted

    commonest = Counter(tag for tags in gold for tag in tags).most_common(1)[0][0]
    return EvaluationSet(
        features=features,
        decide=decide,
        score=lambda answers: entity_scores(gold, answers),
        shown=[{"words": [*s.words], "tags": [*s.tags]} for s in dataset],
        guess=[[commonest] * len(tags) for tags in gold],
        wrong=lambda _, answers: [_share_wrong(*pair) for pair in zip(gold, answers, strict=True)],
    )


def _share_wrong(gold: Sequence[str], given: Sequence[str]) -> float:
    """Of the tags of a sentence."""
    return sum(a != b for a, b in zip(gold, given, strict=True)) / max(1, len(gold))


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Scores:
    """Precision, recall and F1 of whole entities over all sentences, as CoNLL 2003 has them; accuracy of tags."""
    wanted, given = ([entities(tags) for tags in dataset] for dataset in (gold, predicted))
    right = sum(len(a & b) for a, b in zip(wanted, given, strict=True))
    num_wanted, num_given = sum(map(len, wanted)), sum(map(len, given))
    same = [a == b for tags, guesses in zip(gold, predicted, strict=True) for a, b in zip(tags, guesses, strict=True)]
    return {
        "precision": right / max(1, num_given),
        "recall": right / max(1, num_wanted),
        "f1": 2 * right / max(1, num_wanted + num_given),
        "accuracy": sum(same) / len(same),
    }


def _encoded(
    dataset: Sequence[Sentence], ids: dict[str, int], tokenizer: Any, max_len: int, name: str | None = None
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Features with a label at each word's first piece, and which words of each sentence have one."""
    encoded = tokenizer([[*s.words] for s in dataset], is_split_into_words=True, truncation=True, max_length=max_len)
    if name is not None:
        tell_cut(name, encoded, max_len)
    features, words = [], []
    for i, sentence in enumerate(dataset):
        labels: list[int] = []
        seen: list[int] = []
        for word in encoded.word_ids(i):
            first = word is not None and (not seen or word != seen[-1])
            labels.append(ids[sentence.tags[word]] if first else IGNORED)
            if first:
                seen.append(word)
        features.append({**{key: values[i] for key, values in encoded.items()}, "labels": labels})
        words.append(seen)
    return features, words


_USAGE = """import torch
from transformers import AutoTokenizer

from finetune.families.tagging import load_tagger  # or AutoModelForTokenClassification; this also loads a CRF

tokenizer, model = AutoTokenizer.from_pretrained("{name}"), load_tagger("{name}")
words = "Ann met Bob in Rome".split()
inputs = tokenizer(words, is_split_into_words=True, truncation=True, return_tensors="pt")
first = [inputs.word_ids().index(number) for number in sorted({{*inputs.word_ids()}} - {{None}})]
with torch.no_grad():
    logits = model(**inputs).logits[0][first]
numbers = model.crf.best(logits) if hasattr(model, "crf") else logits.argmax(-1).tolist()
print([*zip(words, (model.config.id2label[number] for number in numbers))])
"""
TAGGING = Family(
    prepare=prepare,
    predictor=predictor,
    read=conll_rows,
    text=_words,
    usage=_USAGE,
    tag="token-classification",
    options=frozenset({"loss", "head", "data.repair_tags"}),
)

TASKS: Mapping[str, Task] = {"ner": Task(family=TAGGING, score="f1")}
