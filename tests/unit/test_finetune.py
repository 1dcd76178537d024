"""Fine-tuning: files as users have them, scores, a tiny model that learns in seconds; one clear line for each fault."""

import gzip
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cloze import cli
from cloze.errors import TrainingError, UserError
from finetune import families, typed_rows
from finetune import train as training
from finetune.__main__ import finetune
from finetune.__main__ import run as command
from finetune.config import FinetuneConfig, facts
from finetune.data import Dataset, both_sets, label_names, mismatched_set
from finetune.families import SUITES, TASKS, classification
from finetune.families.classification import Example, correlations, examples, scores
from finetune.readers import Row
from finetune.tasks import Prepared
from finetune.train import TaskTrainer, run
from tests.unit.tiny_bert import WORDS, config, write_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"))


def write_tsv(path: Path, count: int, seed: int) -> None:
    """Sentences of up to 90 words, longer than the model's positions; "good" or "bad" tells the label."""
    rng = np.random.default_rng(seed)
    rows = ["label\tid\tsentence"]
    for number in range(count):
        label = "pos" if rng.random() < 0.5 else "neg"
        words = list(rng.choice(WORDS[2:7], rng.integers(1, 90 if number % 10 == 0 else 12)))
        rows.append(f'{label}\t{number}\t{" ".join(["good" if label == "pos" else "bad", *words])} "')
    path.write_text("\n".join(rows) + "\n")


def test_learns_writes_scores_and_a_model_that_loads(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tsv(tmp_path / "train.tsv", 160, 1)
    write_tsv(tmp_path / "dev.tsv", 50, 2)
    settings = config(tmp_path, model, "epochs=3", "num_seeds=2", "patience=2")
    assert command(settings) == 0
    body = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert body["labels"] == ["neg", "pos"]
    assert (body["train_examples"], body["dev_examples"]) == (160, 50)
    assert f"accuracy {body['accuracy']:.4f}  macro_f1 {body['macro_f1']:.4f}" in capsys.readouterr().out
    by_seed = {int(seed): found["accuracy"] for seed, found in body["by_seed"].items()}
    assert body["accuracy"] == pytest.approx(sum(by_seed.values()) / 2)
    assert body["std"]["accuracy"] == pytest.approx(statistics.stdev(by_seed.values()))
    assert by_seed[body["model_of_seed"]] == max(by_seed.values()) > 0.9
    # the written directory stands alone and gives the same predictions
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    dev = examples(both_sets(settings)[1], settings)
    right = 0
    for example in dev:
        encoded = tokenizer(example.first, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            right += loaded.config.id2label[int(loaded(**encoded).logits.argmax())] == example.label
    assert right / len(dev) == pytest.approx(max(by_seed.values()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dev.tsv", "out", "train.tsv"]
    write_three(tmp_path)
    with pytest.raises(UserError, match=r"was fine-tuned for 2 labels \(neg, pos\), the data have 3: 0, 1, 7"):
        finetune(config(tmp_path, tmp_path / "out", f"out={tmp_path}/again"))


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path, model: Path) -> None:
    """The scores of the epochs are given: 0.5, 0.8, 0.7, 0.6; with patience 2 the fourth is the last."""
    write_tsv(tmp_path / "train.tsv", 16, 1)
    write_tsv(tmp_path / "dev.tsv", 16, 2)
    seen: list[np.ndarray] = []

    def decide(logits: np.ndarray, _: object) -> list[float]:
        seen.append(logits)
        return [[0.5, 0.8, 0.7, 0.6, 0.8, 0.8][len(seen) - 1]] * 16

    def score(answers: Sequence[float]) -> dict[str, float]:
        return {"accuracy": answers[0]}

    settings = config(tmp_path, model, "epochs=9", "patience=2")

    def prepare(config: FinetuneConfig) -> Prepared:
        found = classification.prepare(config)
        dev = replace(found.dev, decide=decide, score=score, guess=[0.1] * 16, wrong=None)
        return replace(found, dev=dev)

    run(settings, prepare)
    assert len(seen) == 4 + 1  # the last is the evaluation at the end
    assert (seen[4] == seen[1]).all()
    assert (seen[4] != seen[3]).any()


def test_pairs_in_jsonl_and_the_same_seed_twice(tmp_path: Path, model: Path) -> None:
    rows = [{"sentence1": "good film", "sentence2": "bad", "label": i % 3, "idx": i} for i in range(30)]
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    bodies = []
    for out in ("a", "b"):
        assert command(config(tmp_path, model, "epochs=1", f"out={tmp_path / out}", suffix="jsonl")) == 0
        bodies.append(json.loads((tmp_path / out / "metrics.json").read_text()))
        assert bodies[-1]["labels"] == ["0", "1", "2"]
        assert bodies[-1].pop("config") == facts(
            config(tmp_path, model, "epochs=1", "max_len=64", f"out={tmp_path / out}", suffix="jsonl")
        )
    assert bodies[0] == bodies[1]


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path: Path, model: Path) -> None:
    """Each seed gives its own new layers, its own order and its own dropout."""
    write_tsv(tmp_path / "train.tsv", 32, 1)
    write_tsv(tmp_path / "dev.tsv", 8, 2)
    seen: list[np.ndarray] = []
    heads: list[torch.Tensor] = []

    def prepare(config: FinetuneConfig) -> Prepared:
        found = classification.prepare(config)

        def make_model() -> Any:
            model = found.make_model()
            heads.append(model.classifier.weight.detach().clone())
            return model

        def decide(logits: np.ndarray, model: Any) -> Sequence[Any]:
            seen.append(logits)
            return found.dev.decide(logits, model)

        return replace(found, make_model=make_model, dev=replace(found.dev, decide=decide))

    def order(seed: int) -> list[int]:
        settings = config(tmp_path, model, f"seed={seed}")
        prepared = classification.prepare(settings)
        arguments = training._arguments(settings, prepared, tmp_path, seed)
        trainer = TaskTrainer(
            settings, prepared, model=prepared.make_model(), args=arguments, train_dataset=[*range(32)]
        )
        trainer.data_collator = lambda rows: {"rows": torch.as_tensor(rows)}
        return torch.cat([batch["rows"] for batch in trainer.get_train_dataloader()]).tolist()

    run(config(tmp_path, model, "epochs=1", "num_seeds=2"), prepare)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    run(config(tmp_path, model, "epochs=1", "seed=2", f"out={tmp_path}/two"), prepare)
    assert np.array_equal(seen[1], seen[2])
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == [*range(32)]


def test_an_unbalanced_dev_set_is_warned_of(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.tsv").write_text(GOOD)
    (tmp_path / "dev.tsv").write_text(GOOD + "c\tx\n" * 18)
    assert finetune(config(tmp_path, model, "epochs=1"))["accuracy"] in (0.05, 0.95)
    assert "dev.tsv: 95.0% of the examples have one label: accuracy says little" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["majority"] == 0.95


def test_divergence_is_told(tmp_path: Path, model: Path) -> None:
    write_three(tmp_path)
    with pytest.raises(TrainingError, match=r"optim\.lr=1e\+30: training with seed 1 diverged") as caught:
        finetune(config(tmp_path, model, "optim.lr=1e30", "epochs=3"))
    assert caught.value.exit_code == 70


def test_several_processes_are_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="fine-tuning is one process"):
        finetune(config(tmp_path, model))


def test_regression_learns_a_number(tmp_path: Path, model: Path) -> None:
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(120):
        goods = int(rng.integers(0, 6))
        rows.append(f"{' '.join(rng.permutation(['good'] * goods + ['bad'] * (5 - goods)))}\tfilm\t{goods}")
    for name, own in (("train.tsv", rows[:80]), ("dev.tsv", rows[80:])):
        (tmp_path / name).write_text("\n".join(["sentence1\tsentence2\tscore", *own]))
    result = finetune(config(tmp_path, model, "task=stsb", "epochs=6"))
    assert result["pearson"] > 0.9
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t7\n")
    with pytest.raises(UserError, match=r"data\.dev=.*dev\.tsv: line 2: .*label '7': must be a number from 0 to 5"):
        finetune(config(tmp_path, model, "task=stsb", f"out={tmp_path}/b"))


def read(folder: Path, text: str | bytes, *overrides: str, name: str = "train.tsv") -> list[Example]:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    files = [f"data.train={path}", f"data.dev={path}", "model=m", "out=o"]
    settings = cli.compose("finetune", FinetuneConfig, [*files, *overrides])
    return examples(both_sets(settings)[0], settings)


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("cola", "gj04\t1\t\tA sentence.\ngj04\t0\t*\tBad is.\n", Example("A sentence.", None, "acceptable")),
        ("cola", "sentence\tlabel\nA.\t1\n", Example("A.", None, "acceptable")),
        ("sst2", 'sentence\tlabel\n"quoted\t0\r\n', Example('"quoted', None, "negative")),
        ("mrpc", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n", Example("a", "b", "equivalent")),
        ("stsb", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t4.5\n", Example("a", "b", "4.5")),
        ("qqp", "id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t1\n", Example("a", "b", "duplicate")),
        ("qqp", "id\tquestion1\tquestion2\tis_duplicate\n0\ta\n1\ta\tb\t0\n", Example("a", "b", "not_duplicate")),
        (
            "mnli",
            "index\tsentence1\tsentence2\tgold_label\n0\tx\ty\t-\n1\ta\tb\tneutral\n",
            Example("a", "b", "neutral"),
        ),
        ("qnli", "index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n", Example("a", "b", "entailment")),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", Example("a", "b", "entailment")),
        ("wnli", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", Example("a", "b", "entailment")),
        ("chnsenticorp", "label\ttext_a\n1\t好\n", Example("好", None, "positive")),
    ],
)
def test_the_files_of_the_benchmarks(task: str, text: str, expected: Example, tmp_path: Path) -> None:
    assert read(tmp_path, text, f"task={task}")[0] == expected


def test_other_files(tmp_path: Path) -> None:
    row = '{"label": "102", "label_desc": "news", "sentence": "好", "keywords": ""}\n'
    assert read(tmp_path, row, "task=tnews", name="a.json") == [Example("好", None, "102")]
    row = '{"sentence1": "a", "sentence2": "b", "label": "-"}\n{"sentence1": "a", "sentence2": "b", "label": "neutral"}'
    assert read(tmp_path, row, "task=ocnli", name="a.jsonl") == [Example("a", "b", "neutral")]
    assert read(tmp_path, 'sentence,label\n"a, ""b""\nc",x\n', name="a.csv") == [Example('a, "b"\nc', None, "x")]
    packed = gzip.compress(b"q\tr\tgold\na\tb\tx\n")
    assert read(tmp_path, packed, "data.columns=[r,q,gold]", name="a.tsv.gz") == [Example("b", "a", "x")]
    assert {name for suite in SUITES.values() for name in suite} <= TASKS.keys()


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` is asked for the right split, and numbered labels come back under their names."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    asked: list[tuple[str, str | None, str]] = []

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, -1]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = both_sets(cli.compose("finetune", FinetuneConfig, ["task=mnli", "model=m", "out=o"]))[0].rows
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]
    assert [row.columns["label"] for row in rows] == ["yes", "-"]
    monkeypatch.undo()
    absent = cli.compose("finetune", FinetuneConfig, [f"data.train='hub:{tmp_path}/no:train'", "model=m", "out=o"])
    with pytest.raises(UserError, match=r"data\.train=hub:.*: .*name a file"):
        both_sets(absent)


def test_a_data_set_that_is_a_script_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found wikipedia.py\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    settings = cli.compose("finetune", FinetuneConfig, ["task=sst2", "model=m", "out=o"])
    with pytest.raises(
        UserError, match=r"^data\.train=hub:\S+: Dataset scripts [^\n]*wikipedia\.py; name a file[^\n]*$"
    ):
        both_sets(settings)


def test_a_new_family_is_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = "from finetune.tasks import Family, Task\nTASKS = {'toy': Task(family=Family(prepare=print), score='f1')}\n"
    (tmp_path / "toy.py").write_text(toy)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert families._found().keys() - TASKS.keys() == {"toy"}
    monkeypatch.delitem(sys.modules, "finetune.families.toy")


HUB_NAMES = {  # in the hub's order, which gives the ids
    "cola": ("unacceptable", "acceptable"), "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"), "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"), "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"), "wnli": ("not_entailment", "entailment"),
}  # fmt: skip


@pytest.mark.parametrize("task", HUB_NAMES)
def test_a_label_of_the_hub_is_that_of_the_files(task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Number i of the hub, number i of a file, and the name are one label, whose id is i; F1 is of the second."""
    names = HUB_NAMES[task]
    texts = TASKS[task].layouts[0][:-1]
    kinds = dict.fromkeys(texts, datasets.Value("string")) | {"label": datasets.ClassLabel(names=list(names))}
    columns = dict.fromkeys(texts, ["a"] * 9) | {"label": [i % len(names) for i in range(9)]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    settings = cli.compose("finetune", FinetuneConfig, [f"task={task}", "model=m", "out=o"])
    of_hub = [example.label for example in examples(both_sets(settings)[0], settings)]
    for labels in (of_hub, [names[i % len(names)] for i in range(9)]):
        rows = "\n".join(["\t".join([*texts, "label"]), *("\t".join(["a"] * len(texts) + [one]) for one in labels)])
        assert [example.label for example in read(tmp_path, rows, f"task={task}")] == of_hub
    assert label_names(Dataset(name="x", rows=[]), of_hub, settings) == list(names)
    gold = np.asarray([names.index(label) for label in of_hub])
    if len(names) == 2:
        assert scores(gold, np.ones(9, dtype=int), 2)["f1"] == pytest.approx(2 * 4 / 9 / (1 + 4 / 9))


@pytest.mark.parametrize("label", ["7", "-1", "good"])
def test_labels_that_a_task_does_not_have(label: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"train\.tsv: line 3: task=sst2: label '{label}': must be negative, positive or 0 to 1"
    ):
        read(tmp_path, f"sentence\tlabel\na\t0\nb\t{label}\n", "task=sst2")


def test_mismatched_examples_are_scored_beside_dev(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["sentence1\tsentence2\tgold_label", *["good\tfilm\tneutral", "bad\tfilm\tentailment"] * 20]
    (tmp_path / "train.tsv").write_text("\n".join(rows))
    (tmp_path / "dev.tsv").write_text("\n".join(rows[:11]))
    wrong = "good\tfilm\tentailment", "bad\tfilm\tneutral", "good\tfilm\tneutral", "bad\tfilm\tcontradiction"
    (tmp_path / "other.tsv").write_text("\n".join([rows[0], *wrong]))
    own = ["task=mnli", "epochs=10", f"data.mismatched={tmp_path}/other.tsv"]
    with pytest.raises(UserError, match=r"other\.tsv: line 5: label 'contradiction' is not in data\.train, which"):
        finetune(config(tmp_path, model, *own))
    (tmp_path / "other.tsv").write_text("\n".join([rows[0], *wrong[:3]]))
    result = finetune(config(tmp_path, model, *own))
    assert (result["accuracy"], result["mismatched_accuracy"]) == (1, pytest.approx(1 / 3))
    asked: list[str] = []
    monkeypatch.setattr(typed_rows, "hub_rows", lambda source: asked.append(source) or [Row("x", {})])
    mismatched_set(cli.compose("finetune", FinetuneConfig, ["task=mnli", "model=m", "out=o"]))
    assert asked == ["hub:nyu-mll/glue@mnli:validation_mismatched"]
    with pytest.raises(UserError, match=r"data\.mismatched: task=stsb has none"):
        config(tmp_path, model, "task=stsb", "data.mismatched=x")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100]) and None


def fill_out(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "kept").write_text("mine")


GOOD = "sentence\tlabel\na\tx\nb\ty\n"
SINGLE = "sentence\tlabel\na\tx\n"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (remove("train.tsv"), r"data\.train=.*/train\.tsv: no such file"),
        (remove("dev.tsv"), r"data\.dev=.*/dev\.tsv: no such file"),
        (
            put("train.tsv", "text\tgold\na\tx\n"),
            r"line 2: the columns sentence, label or text, label or .* needed, there",
        ),
        (
            put("train.tsv", "a film\t1\nb film\t0\n"),
            r"line 2: the columns .* needed, there are a film, 1; data\.columns",
        ),
        (
            put("dev.tsv", "sentence\tlabel\na\t\n"),
            r'dev\.tsv: line 2: label is ""; a text is needed there',
        ),
        (put("dev.tsv", "sentence\tlabel\na\tx\textra\n"), r"line 2: 3 columns where the header has 2"),
        (
            put("dev.tsv", "sentence\tlabel\na\tz\n"),
            r"dev\.tsv: line 2: label 'z' is not in data\.train, which has x",
        ),
        (put("dev.tsv", "sentence\tlabel\n"), r"data\.dev=.*: holds no examples"),
        (put("dev.tsv", ""), r"data\.dev=.*: holds no examples"),
        (put("dev.tsv", SINGLE), r"data\.dev=.*: every label is 'x': scores would say nothing"),
        (put("dev.tsv", "sentence1\tsentence2\tlabel\na\tb\tx\n"), r"one of data\.train and data\.dev has pairs"),
        (put("train.tsv", SINGLE), r"every label is 'x'"),
        (fill_out, r"out=.*: not empty"),
        (remove("model/config.json"), r"model=.*: no config\.json"),
        (lambda f: [(f / "model" / n).unlink() for n in ("vocab.txt", "tokenizer.json")] and None, r"has no tokenizer"),
        (put("model/config.json", '{"model_type": "nope"}'), r"model=.*: cannot be loaded"),
        (remove("model/model.safetensors"), r"model=.*: cannot be loaded"),
        (truncate("model/model.safetensors"), r"model=.*: cannot be loaded"),
        (put("out", "a file"), r"out=.*/out: .*/out is a file; name another directory"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    spoil: Callable[[Path], None], expected: str, tmp_path: Path, model: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(GOOD)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=expected) as caught:
        command(config(tmp_path, tmp_path / "model", "epochs=1"))
    assert caught.value.exit_code == 64
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_lines_are_named(tmp_path: Path) -> None:
    for text, fault in (
        ('{"sentence"\n', "line 1: not JSON"),
        ('["a"]', "item 1: not a JSON object"),
        ('[{"sentence": "a"}', "train=.*: not JSON .* an array of objects, or an object on each line"),
        (b"\xff\xfe", "holds no examples"),
        (b"ok\n\x80abc", "line 2: is not UTF-8"),
        ('{"sentence": ["a", "b"], "label": 1}', r'line 1: sentence is \["a", "b"\]; a text is needed there'),
    ):
        with pytest.raises(UserError, match=fault):
            read(tmp_path, text, name="a.jsonl")
    with pytest.raises(UserError, match=r"data\.train=hub:foo: NAME and SPLIT are needed: hub:NAME:SPLIT"):
        read(tmp_path, "", "data.train='hub:foo'")
    with pytest.raises(UserError, match=r"data\.train: task=classification needs a file"):
        both_sets(cli.compose("finetune", FinetuneConfig, ["model=m", "out=o"]))


def test_a_long_field_of_a_csv_file(tmp_path: Path) -> None:
    """Longer than Python's csv module takes by itself."""
    text = "a " * 100_000
    assert read(tmp_path, f'sentence,label\n"{text}",x\n', name="a.csv") == [Example(text, None, "x")]


def test_out_below_a_file(tmp_path: Path, model: Path) -> None:
    write_three(tmp_path)
    with pytest.raises(UserError, match=r"out=.*dev\.tsv/x: .*dev\.tsv is a file; name another") as caught:
        finetune(config(tmp_path, model, f"out={tmp_path}/dev.tsv/x"))
    assert caught.value.exit_code == 64


def write_three(folder: Path) -> Path:
    for name in ("dev.tsv", "train.tsv"):
        (folder / name).write_text("sentence\tlabel\na\t0\nb\t1\nc\t7\n")
    return folder / "train.tsv"


@pytest.mark.parametrize(
    "bad",
    [
        "epochs=0", "max_len=2", "optim.lr=0", "task=nope", "batch_size=x", "head=crf", "optim.layer_decay=0",
        "loss.label_smoothing=1", "freeze_layers=-2", "[lora.rank=2,freeze_layers=1]",
        "[adversary.kind=fgm,lora.rank=2]",
        "optim.crf_lr=0", "[task=regression,loss.r_drop=1]", "[task=ner,head=crf,loss.balanced=true]",
    ],
)  # fmt: skip
def test_bad_values_are_refused_before_anything_is_read(bad: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=bad.strip("[]").split(",")[-1].split("=")[0].split(".")[0]):
        config(tmp_path, tmp_path, *bad.strip("[]").split(","))


def test_scores_are_the_field_s() -> None:
    """By hand, from a confusion of 3 true positives, 1 false negative, 2 false positives and 4 true negatives."""
    labels, predicted = np.asarray([1] * 4 + [0] * 6), np.asarray([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    found = scores(labels, predicted, 2)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(6 / 9)
    assert found["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert found["matthews"] == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))
    assert scores(labels, np.ones(10, dtype=int), 2)["matthews"] == 0
    numbers = np.asarray([1.0, 2.0, 4.0])
    assert correlations(numbers, numbers**2 + 1)["spearman"] == pytest.approx(1)
    assert correlations(numbers, np.ones(3)) == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx(10 / 3)}
