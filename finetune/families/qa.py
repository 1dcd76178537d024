"""Answering a question by a span of its context (SQuAD): long contexts in overlapping windows, exact match and F1.

A context without an answer points at [CLS], as in BERT's run for SQuAD 2.0 (Devlin et al. 2019, section 4.3).
"""

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError
from cloze.log import log
from finetune.data import BadRow, Dataset, both_sets, more_sets
from finetune.predictor import Encoded, Predictor, Trained, chosen, empty, texts
from finetune.readers import Columns, Row, json_rows
from finetune.tasks import EvaluationSet, Family, Prepared, Scores, Task, TaskConfig

_ANSWER = ("text", "answer_start")
_MAX_ANSWER = 30  # tokens of an answer at most
_PUNCTUATION = re.compile(rf"[{re.escape(string.punctuation)}\u3000-\u303f\uff00-\uffef]")  # ASCII, Chinese

Offsets = list[tuple[int, int] | None]  # characters of each token of the context; None: not of the context


class Question(NamedTuple):
    id: str
    question: str
    context: str
    answers: tuple[str, ...]  # empty: the context has none (SQuAD 2.0)
    start: int | None  # first character of answers[0]; None: unknown, or there is none


def squad_rows(text: str, path: str, columns: Columns) -> list[Row]:
    """SQuAD's nested JSON, CMRC's own, or an object for each question with id, question, context and answers."""
    del path, columns
    try:
        body = json.loads(text)
    except ValueError:
        return json_rows(text)  # many objects, or none: lines tell where it breaks
    try:
        if isinstance(body, dict) and "data" in body:
            paragraphs = [paragraph for article in body["data"] for paragraph in article["paragraphs"]]
            return [_squad_row(qa, paragraph["context"]) for paragraph in paragraphs for qa in paragraph["qas"]]
        if isinstance(body, list) and body and "context_text" in body[0]:
            return [_cmrc_row(qa, paragraph["context_text"]) for paragraph in body for qa in paragraph["qas"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"not SQuAD's format ({error}); data, paragraphs, qas and context are needed") from None
    return json_rows(text)


def _squad_row(qa: Mapping[str, Any], context: str) -> Row:
    answers: dict[str, Any] = {"answers": []} if qa.get("is_impossible") else {}
    return Row(f"question {qa.get('id')}", {**qa, "context": context, **answers})


def _cmrc_row(qa: Mapping[str, Any], context: str) -> Row:
    """Its answers are texts alone, meant where they stand first."""
    answers = [{"text": text, "answer_start": context.find(text)} for text in dict.fromkeys(qa["answers"])]
    columns = {"id": qa["query_id"], "question": qa["query_text"], "context": context, "answers": answers}
    return Row(f"question {qa['query_id']}", columns)


def questions(dataset: Dataset, *, need_places: bool = True) -> list[Question]:
    """Questions with their answers, given as SQuAD's list of objects or as the hub's object of lists.

    An answer that is not at its place is looked for: it must stand in the context once. What is learned from must have
    its place (`need_places`); for scores the texts suffice.
    """
    num_moved = 0

    def parse(row: Row) -> Question:
        nonlocal num_moved
        columns = row.columns
        if missing := [name for name in ("question", "context", "answers") if columns.get(name) is None]:
            raise BadRow(f"no {' and no '.join(missing)}; there are {', '.join(columns)}")
        if faulty := [name for name in ("question", "context") if not isinstance(columns[name], str)]:
            raise BadRow(f"{faulty[0]} is {json.dumps(columns[faulty[0]])[:40]}; a text is needed there")
        given, context = _spans(columns["answers"]), columns["context"]
        if not given:
            return Question(str(columns.get("id", row.place)), columns["question"], context, (), None)
        found = [(text, _place(text, start, context)) for text, start in given]
        placed = [(text, start) for text, start in found if start is not None]
        if need_places and not placed:
            text, start = given[0]
            raise BadRow(f"the context does not have the answer {text[:60]!r} at character {start}, nor once elsewhere")
        num_moved += any(start not in (None, said) for (_, start), (_, said) in zip(found, given, strict=True))
        answers = placed + [one for one in found if one[1] is None]
        texts = tuple(text for text, _ in answers)
        return Question(str(columns.get("id", row.place)), columns["question"], context, texts, answers[0][1])

    converted = dataset.convert(parse)
    if num_moved:
        log.warning(
            f"{dataset.name}: answers that are not at their answer_start, but once elsewhere, found there: {num_moved}"
        )
    return converted


def _spans(answers: Any) -> list[tuple[str, int]]:
    """(text, first character) of each answer, without blanks around it. Raises `BadRow`."""
    try:
        if isinstance(answers, dict):
            answers = [{"text": t, "answer_start": s} for t, s in zip(*map(answers.get, _ANSWER), strict=True)]
        spans = [(str(answer["text"]), int(answer["answer_start"])) for answer in answers]
    except (TypeError, KeyError, ValueError):
        raise BadRow("answers need text and answer_start") from None
    bare = [(text.strip(), start + len(text) - len(text.lstrip())) for text, start in spans if text.strip()]
    if spans and not bare:
        raise BadRow("its answer is blank")
    return bare


def _place(text: str, start: int, context: str) -> int | None:
    """Where the answer stands: as said, else the one place that has it, else None."""
    if start >= 0 and context.startswith(text, start):
        return start
    at = context.find(text)
    return at if at >= 0 and context.find(text, at + 1) < 0 else None


def prepare(config: TaskConfig) -> Prepared:
    """Shapes of predictions: a pair of [windows, T] logits, of starts and of ends."""
    from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

    from finetune.models import load_encoder_tokenizer, load_model, load_teacher

    train_set, dev_set = both_sets(config)
    train, dev = questions(train_set), questions(dev_set, need_places=False)
    more = {name: questions(dataset, need_places=False) for name, dataset in more_sets(config).items()}
    tokenizer = load_encoder_tokenizer(config)
    train, dev = (_shortened(own, tokenizer, config, one.name) for own, one in ((train, train_set), (dev, dev_set)))
    more = {name: _shortened(own, tokenizer, config, f"data.{name}") for name, own in more.items()}
    if not any(question.answers for question in train):
        raise UserError(f"{train_set.name}: no question has an answer: there is nothing to learn; add some that have")
    train_features, _, _ = windows(train, tokenizer, config.max_len, config.stride)
    with_none = any(not question.answers for question in train)

    def questioned(dataset: Sequence[Question]) -> EvaluationSet:
        return _evaluation_set(dataset, windows(dataset, tokenizer, config.max_len, config.stride), with_none)

    asked = questioned(dev)
    return Prepared(
        tokenizer=tokenizer,
        make_model=lambda: load_model(config, AutoModelForQuestionAnswering),
        train=train_features,
        dev=asked,
        more={name: questioned(dataset) for name, dataset in more.items()},
        collate=DataCollatorWithPadding(tokenizer),
        label_columns=("start_positions", "end_positions"),
        teacher=load_teacher(config, AutoModelForQuestionAnswering, None, tokenizer),
        facts={"dev_windows": len(asked.features), "has_no_answer": with_none},
    )


def _shortened(dataset: Sequence[Question], tokenizer: Any, config: TaskConfig, name: str) -> list[Question]:
    """The questions, of which the longest are cut to leave room for a context, and told.

    Raises `UserError` where they are more than data.max_bad_fraction: then `max_len` is too short for these data.
    """
    stripped = [one.question.strip() for one in dataset]
    asked, cut = _fitting(stripped, tokenizer, config.max_len, config.stride)
    if cut and (len(cut) > max(1, config.data.max_bad_fraction * len(dataset)) or len(cut) == len(dataset)):
        longest = max(len(ids) for ids in tokenizer([stripped[n] for n in cut], add_special_tokens=False).input_ids)
        raise UserError(
            f"max_len={config.max_len}: a question has {longest} tokens; raise max_len, or lower stride={config.stride}"
        )
    if cut:
        room = f"leave no room for a context at max_len={config.max_len}, and are cut"
        log.warning(f"{name}: {len(cut)} of {len(dataset)} questions {room}")
    return [one._replace(question=text) for one, text in zip(dataset, asked, strict=True)]


def _evaluation_set(
    dataset: Sequence[Question], cut: tuple[list[dict[str, Any]], list[int], list[Offsets]], with_none: bool
) -> EvaluationSet:
    """Of questions `cut` into windows. Answers are texts, "" where there is none, which is guessed everywhere."""
    features, owners, offsets = cut

    def decide(logits: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]], _: Any) -> list[str]:
        best: dict[int, tuple[float, str]] = {}
        nothing: dict[int, float] = {}
        for starts_T, ends_T, owner, own in zip(*logits, owners, offsets, strict=True):
            candidate = best_span(starts_T[: len(own)], ends_T[: len(own)], own, dataset[owner].context)
            best[owner] = max(best.get(owner, (-np.inf, "")), candidate)
            nothing[owner] = min(nothing.get(owner, np.inf), float(starts_T[0] + ends_T[0]))
        return ["" if with_none and nothing[i] > best[i][0] else best[i][1] for i in range(len(dataset))]

    return EvaluationSet(
        features=features,
        decide=decide,
        score=lambda answers: answer_scores(answers, [question.answers for question in dataset]),
        shown=[{"id": one.id, "question": one.question, "answers": [*one.answers]} for one in dataset],
        guess=[""] * len(dataset),
        wrong=lambda _, answers: [
            1 - answer_scores([answer], [question.answers])["f1"]
            for answer, question in zip(answers, dataset, strict=True)
        ],
    )


def is_nested(head: str) -> bool:
    """Whether a file that begins so is in a layout of paragraphs, which `squad_rows` reads, rather than in rows."""
    return re.search(r'"(paragraphs|context_text)"\s*:', head) is not None


class _Found(NamedTuple):
    """The best span of a window."""

    value: float  # start logit + end logit
    probability: float
    place: tuple[int, int] | None  # characters of the context; None: it has no answer


def predictor(trained: Trained, first: Row) -> Predictor:
    """A span of the context, where it stands, and the probability that it begins and ends there."""
    question, context = chosen(trained.layouts or (("question", "context"),), first)
    return Predictor(
        auto_class="AutoModelForQuestionAnswering",
        adds=("prediction", "start", "end", "probability"),
        encode=lambda rows: _encoded(rows, (question, context), trained),
        outputs=("start_logits", "end_logits"),
    )


def _encoded(rows: Sequence[Row], columns: tuple[str, str], trained: Trained) -> Encoded:
    found = texts(rows, columns)
    asked, cut = _fitting(
        [question.strip() for question, _ in found], trained.tokenizer, trained.max_len, trained.stride
    )
    dataset = [Question("", q, context, (), None) for q, (_, context) in zip(asked, found, strict=True)]
    features, owners, offsets = windows(dataset, trained.tokenizer, trained.max_len, trained.stride)

    def read(number: int, outputs: Any) -> tuple[_Found, _Found]:
        """The best span, and that there is none."""
        starts_T, ends_T = (logits[: len(offsets[number])] for logits in outputs)
        value, start, end = best_tokens(starts_T, ends_T, offsets[number])
        first, last = offsets[number][start], offsets[number][end]
        begin_T, finish_T = _shares(starts_T), _shares(ends_T)
        nothing = _Found(float(starts_T[0] + ends_T[0]), float(begin_T[0] * finish_T[0]), None)
        if first is None or last is None:
            return _Found(-np.inf, 0.0, None), nothing
        return _Found(value, float(begin_T[start] * finish_T[end]), (first[0], last[1])), nothing

    def answers(spans: Sequence[tuple[_Found, _Found]]) -> list[dict[str, Any]]:
        best: dict[int, _Found] = {}
        nothing: dict[int, _Found] = {}
        for owner, (span, none) in zip(owners, spans, strict=True):
            best[owner] = max(best.get(owner, span), span, key=lambda one: one.value)
            nothing[owner] = min(nothing.get(owner, none), none, key=lambda one: one.value)
        rows = []
        for number, question in enumerate(dataset):
            has_none = trained.has_no_answer and nothing[number].value > best[number].value
            own = nothing[number] if has_none else best[number]
            start, end = own.place or (None, None)
            text = question.context[start:end] if own.place else ""
            rows.append({"prediction": text, "start": start, "end": end, "probability": round(own.probability, 6)})
        return rows

    kept = [
        {name: feature[name] for name in trained.tokenizer.model_input_names if name in feature} for feature in features
    ]
    return Encoded(kept, read, answers, cut, empty(found))


def _shares(logits_T: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    powers_T = np.exp(logits_T.astype(np.float64) - logits_T.max())
    return np.asarray(powers_T / powers_T.sum())


def _fitting(asked: Sequence[str], tokenizer: Any, max_len: int, stride: int) -> tuple[list[str], list[int]]:
    """Questions, of which the longest leave room for a context; and which were cut."""
    room = max_len - stride - 4
    if room < 1:
        raise UserError(f"max_len={max_len}: no room for a question beside a stride of {stride}; raise it")
    encoded = tokenizer(list(asked), add_special_tokens=False, return_offsets_mapping=True)
    fitting = [
        text[: own[room - 1][1]] if len(own) > room else text
        for text, own in zip(asked, encoded.offset_mapping, strict=True)
    ]
    return fitting, [number for number, text in enumerate(fitting) if text != asked[number]]


def windows(
    dataset: Sequence[Question], tokenizer: Any, max_len: int, stride: int
) -> tuple[list[dict[str, Any]], list[int], list[Offsets]]:
    """Features of question and window, the question that each belongs to, and where its context's tokens stand."""
    pairs = [question.question.strip() for question in dataset], [question.context for question in dataset]
    encoded = tokenizer(
        *pairs, truncation="only_second", max_length=max_len, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    owners, all_offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    features, kept = [], []
    for i, owner in enumerate(owners):
        of_context = [part == 1 for part in encoded.sequence_ids(i)]
        offsets: Offsets = [span if own else None for span, own in zip(all_offsets[i], of_context, strict=True)]
        start, end = _answer_tokens(dataset[owner], offsets)
        own = {key: values[i] for key, values in encoded.items()}
        features.append({**own, "start_positions": start, "end_positions": end})
        kept.append(offsets)
    return features, owners, kept


def _answer_tokens(question: Question, offsets: Offsets) -> tuple[int, int]:
    """First and last token of the answer, or [CLS] twice where the window does not hold all of it."""
    context = [i for i, span in enumerate(offsets) if span]
    if question.start is None or not context:
        return 0, 0
    first, after = question.start, question.start + len(question.answers[0])
    begins, ends = zip(*(offsets[i] or (0, 0) for i in context), strict=True)
    if begins[0] > first or ends[-1] < after:
        return 0, 0
    return context[sum(begin <= first for begin in begins) - 1], context[sum(end < after for end in ends)]


def best_span(
    starts_T: npt.NDArray[np.float32], ends_T: npt.NDArray[np.float32], offsets: Offsets, context: str
) -> tuple[float, str]:
    """(start logit + end logit, text) of the best span of the context of at most `_MAX_ANSWER` tokens."""
    value, start, end = best_tokens(starts_T, ends_T, offsets)
    first, last = offsets[start], offsets[end]
    if first is None or last is None:  # a window of the question alone
        return -np.inf, ""
    return value, context[first[0] : last[1]]


def best_tokens(
    starts_T: npt.NDArray[np.float32], ends_T: npt.NDArray[np.float32], offsets: Offsets
) -> tuple[float, int, int]:
    """(start logit + end logit, first token, last token) of that span; -inf where there is no context."""
    allowed_T = np.array([span is not None for span in offsets])
    lengths_TT = np.arange(len(offsets))[None, :] - np.arange(len(offsets))[:, None]
    spans_TT = (lengths_TT >= 0) & (lengths_TT < _MAX_ANSWER) & allowed_T[:, None] & allowed_T
    sums_TT = np.where(spans_TT, starts_T[:, None] + ends_T, -np.inf)
    start, end = np.unravel_index(sums_TT.argmax(), sums_TT.shape)
    return float(sums_TT[start, end]), int(start), int(end)


def answer_scores(answers: Sequence[str], gold: Sequence[Sequence[str]]) -> Scores:
    """Exact match and F1 of words, against the nearest of the right answers (Rajpurkar et al. 2016, section 6.1)."""
    exact, overlap = [], []
    for answer, right in zip(answers, gold, strict=True):
        given, wanted = normal_words(answer), [normal_words(text) for text in right or [""]]
        exact.append(max(given == words for words in wanted))
        overlap.append(max(_f1(given, words) for words in wanted))
    return {"exact_match": sum(exact) / len(exact), "f1": sum(overlap) / len(overlap)}


def normal_words(text: str) -> list[str]:
    """Lower case without punctuation and articles, as in SQuAD's script; an ideograph is a word, as in CMRC's."""
    kept = _PUNCTUATION.sub("", text.lower())
    return re.sub("([\u3400-\u9fff])", r" \1 ", re.sub(r"\b(a|an|the)\b", " ", kept)).split()


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    return 2 * sum((Counter(given) & Counter(wanted)).values()) / (len(given) + len(wanted))


_USAGE = """import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForQuestionAnswering.from_pretrained("{name}").eval()
inputs = tokenizer("Who was it?", "It was Ann.", truncation="only_second", return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
start, end = int(outputs.start_logits[0].argmax()), int(outputs.end_logits[0].argmax())
print(tokenizer.decode(inputs.input_ids[0, start : end + 1]))  # [CLS]: the context does not say
"""
QA = Family(
    prepare=prepare,
    predictor=predictor,
    read=squad_rows,
    text=lambda row, columns: row.columns.get("context"),
    usage=_USAGE,
    tag="question-answering",
    options=frozenset({"stride"}),
)

TASKS: Mapping[str, Task] = {"squad": Task(family=QA, score="f1", hub="rajpurkar/squad")}
