"""ONNX and int8 give PyTorch's predictions; the probes give what a loop over Hugging Face's model gives."""

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from cloze.errors import UserError
from finetune import compress as command
from finetune import onnx_export, predict, probe
from finetune.__main__ import finetune
from finetune.__main__ import main as finetuning
from finetune.onnx_export import compress
from tests.unit.tiny_bert import config, write_tiny_bert

TEXTS = ["good film", "bad a the very was", "ann met bob", "rome"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"))


def tuned(task: str, folder: Path, model: Path, *overrides: str) -> Path:
    """A model of the task, learned from a few examples that stand in `folder`."""
    suffix = {"ner": "conll", "squad": "jsonl"}.get(task, "tsv")
    if task == "ner":
        lines = ["ann B-PER\nwas O\nin O\nrome B-LOC\nfilms I-LOC\n", "the O\nfilm O\n", "bob B-PER\n"] * 6
        text = "\n".join(lines)
    elif task == "squad":
        answers = [{"text": "ann", "answer_start": 22}], [{"text": "film", "answer_start": 13}], []
        rows = [
            {"id": f"{i}", "question": "who " * (i % 5 + 1), "context": f"the very bad film was ann{' good' * (i % 4)}"}
            for i in range(12)
        ]
        text = "\n".join(json.dumps({**row, "answers": answers[i % 3]}) for i, row in enumerate(rows))
    else:
        labels = ["0.5", "4"] if task == "stsb" else ["entailment", "not_entailment"]
        rows = [f"the {'good' if i % 2 else 'bad'} film\t{'very ' * (i % 7 + 1)}\t{labels[i % 2]}" for i in range(19)]
        text = "\n".join([f"sentence1\tsentence2\t{'score' if task == 'stsb' else 'label'}", *rows])
    for name in ("train", "dev"):
        (folder / f"{name}.{suffix}").write_text(text)
    finetune(config(folder, model, f"task={task}", f"out={folder}/tuned", *overrides, suffix=suffix))
    return folder / "tuned"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("ner", ("epochs=8", "head=crf", "optim.crf_lr=0.1")),
        *(
            pytest.param(*case)
            for case in (
                ("rte", ("epochs=4",)), ("stsb", ("epochs=4",)), ("ner", ("epochs=8",)),
                ("squad", ("epochs=4", "max_len=24", "stride=4")),
            )
        ),
    ],
)  # fmt: skip
def test_onnx_scores_what_the_model_scored(
    task: str, overrides: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs, numbers, windows of questions, tags with and without a CRF: the scores are those of the fine-tuning."""
    before = json.loads((tuned(task, tmp_path, model, *overrides) / "metrics.json").read_text())
    body = compress(tmp_path / "tuned", tmp_path / "out", {})
    assert json.loads((tmp_path / "out" / "compress.json").read_text()) == body
    names = [name for name in body["onnx"] if name in before]
    assert before["score"] in names
    for name in ("pytorch", "onnx"):
        assert [body[name][score] for score in names] == pytest.approx([before[score] for score in names], abs=2e-3)
        assert body[name].get("same_answer", 1) == 1
    assert body["onnx"]["difference"] < 1e-5 < body["onnx_int8"]["difference"]
    assert before["score"] in body["onnx_int8"]
    written = []
    for folder in ("tuned", "out"):  # of ONNX, too, with its CRF
        data = next(tmp_path.glob("dev.*"))
        assert predict.main([str(tmp_path / folder), str(data), f"{tmp_path}/{folder}.txt"]) == 0
        written.append((tmp_path / f"{folder}.txt").read_text().splitlines())
    if task == "stsb":
        assert [float(one) for one in written[0]] == pytest.approx([float(one) for one in written[1]], abs=1e-4)
    else:
        assert written[0] == written[1]


@pytest.mark.slow
def test_the_command_and_other_shapes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tuned("rte", tmp_path, model, "epochs=1", "max_len=64")
    (tmp_path / "dev.tsv").rename(tmp_path / "moved.tsv")
    arguments = [str(folder), str(tmp_path / "out"), "--dev", str(tmp_path / "moved.tsv")]
    assert command.main(arguments[:2]) == 64
    assert "dev.tsv: no such file" in capsys.readouterr().err
    assert command.main(arguments) == 0
    assert re.search(
        r"^onnx_int8  accuracy \d\.\d{4}   same answer .*examples/s$", capsys.readouterr().out, re.MULTILINE
    )
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for count, words in ((1, 3), (5, 30)):
        batch = tokenizer([" ".join(["good", "film"] * words)] * count, return_tensors="np")
        with torch.no_grad():
            expected = plain(**{name: torch.as_tensor(ids) for name, ids in batch.items()}).logits.numpy()
        for name, tolerance in (("model.onnx", 1e-5), ("model-int8.onnx", 0.05)):
            session = onnxruntime.InferenceSession(tmp_path / "out" / name, providers=["CPUExecutionProvider"])
            np.testing.assert_allclose(session.run(None, dict(batch))[0], expected, atol=tolerance)
    body = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert body["bytes"]["model-int8.onnx"] < body["bytes"]["model.onnx"]
    assert all(body[name]["examples_per_second"] > 0 for name in ("pytorch", "onnx", "onnx_int8"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"architectures": ["BertModel"]}')
    wrote = "`python -m finetune` or `python -m pretrain.export` wrote"
    for rest, error in (
        (arguments, f"{tmp_path}/out: not empty; name another directory"),
        (
            [str(tmp_path / "bare"), str(tmp_path / "b")],
            f"{tmp_path}/bare: has no metrics.json; name a directory that {wrote}",
        ),
        (
            [str(model), str(tmp_path / "b"), "--train", "x"],
            "--train: of a pretrained model nothing is trained; leave it out",
        ),
        (
            [str(model), str(tmp_path / "b"), "--dev", f"{tmp_path}/none.txt"],
            f"--dev {tmp_path}/none.txt: cannot be read ([Errno 2] No such file or directory: '{tmp_path}/none.txt'); "
            "a UTF-8 text is needed",
        ),
    ):
        assert command.main(rest) == 64
        assert capsys.readouterr().err == f"error: {error}\n"
    (folder / "model.safetensors").unlink()
    assert command.main([str(folder), str(tmp_path / "b"), *arguments[2:]]) == 64
    assert re.fullmatch(r"error: model=.*: cannot be loaded .*\n", capsys.readouterr().err)
    assert not (tmp_path / "b").exists()


def test_a_pretrained_model_as_onnx_at_three_lengths(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its logits are those of Hugging Face's class; gaps in a text are scored, and of random tokens compared."""
    text = tmp_path / "dev.txt"
    text.write_text("\n".join(["the good film was very bad in rome", "", "ann met bob in the very good film ?"] * 3))
    body = compress(model, tmp_path / "out", {"dev": str(text)})
    assert [*body["differences_by_tokens"]] == ["8", "21", "64"]
    assert max(body["differences_by_tokens"].values()) < 1e-5
    assert body["onnx"]["same_answer"] == 1
    assert body["onnx"]["accuracy"] == body["pytorch"]["accuracy"]
    tokenizer, plain = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForMaskedLM.from_pretrained(model)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    right = total = 0
    for line in filter(None, text.read_text().split("\n")):
        batch = tokenizer(line, return_tensors="np")
        gaps = list(range(3, batch.input_ids.shape[1] - 1, 7))
        gold = batch.input_ids[0, gaps].copy()
        batch.input_ids[0, gaps] = tokenizer.mask_token_id
        logits = session.run(None, dict(batch))[0]
        with torch.no_grad():
            expected = plain.eval()(**{name: torch.as_tensor(ids) for name, ids in batch.items()}).logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        right, total = right + int((logits[0, gaps].argmax(-1) == gold).sum()), total + len(gaps)
    assert body["onnx"]["accuracy"] == pytest.approx(right / total)
    subject = onnx_export._pretrained(model, None)
    assert not subject.is_scored
    assert {batch["input_ids"].shape[1] for batch in subject.batches} == {64}


class Losing:
    """Stands in for the runs of int8 models, which lose so much of a score of 0.9."""

    def __init__(self, *losses: float) -> None:
        self.losses, self.options = [*losses], []

    def compare(self, runners: object) -> dict[str, dict[str, float]]:
        return {"onnx": {"f1": 0.9}, "onnx_int8": {"f1": 0.9 - self.losses[len(self.options) - 1]}}


@pytest.mark.parametrize(
    ("losses", "scored", "tried"), [((0.005,), True, 1), ((0.05, 0.02, 0.0), True, 3), ((0.5,), False, 1)]
)
def test_int8_that_loses_too_much_is_made_more_carefully(
    losses: tuple[float, ...], scored: bool, tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing = Losing(*losses)
    monkeypatch.setattr(onnx_export, "quantize_dynamic", lambda *_, **options: losing.options.append(options))
    monkeypatch.setattr(onnx_export, "_session", lambda path: None)
    monkeypatch.setattr(onnx_export.onnx, "load", lambda path: onnx_export.onnx.ModelProto())
    subject = onnx_export._Subject(None, None, [], losing.compare, "f1", scored, 8)
    body = onnx_export._int8(tmp_path / "a", tmp_path / "b", {}, subject, 0.01)
    assert body["int8_options"] == losing.options[-1]
    assert losing.options == [*onnx_export._INT8][:tried]


def test_int8_that_cannot_keep_the_score_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losing = Losing(0.4, 0.3, 0.2, 0.25)
    monkeypatch.setattr(onnx_export, "quantize_dynamic", lambda *_, **options: losing.options.append(options))
    monkeypatch.setattr(onnx_export, "_session", lambda path: None)
    monkeypatch.setattr(onnx_export.onnx, "load", lambda path: onnx_export.onnx.ModelProto())
    subject = onnx_export._Subject(None, None, [], losing.compare, "f1", True, 8)
    with pytest.raises(UserError, match=r"int8 loses 0\.2000 of f1, more than --max-loss 0\.1; nothing was written"):
        onnx_export._int8(tmp_path / "a", tmp_path / "b", {}, subject, 0.1)


def test_a_student_beside_its_teacher(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters, MB, speed and score of both, in the console, in metrics.json and on the card."""
    teacher = tuned("rte", tmp_path, model, "epochs=1", "max_len=64")
    student = write_tiny_bert(tmp_path / "student", layers=1, hidden=16)
    files = [f"data.{name}={tmp_path}/{name}.tsv" for name in ("train", "dev")]
    own = ["task=rte", f"model={student}", f"out={tmp_path}/small", f"distill.teacher={teacher}", "epochs=1", *files]
    capsys.readouterr()
    assert finetuning([*own, "optim.lr=1e-3", "max_len=64"]) == 0
    body = json.loads((tmp_path / "small" / "metrics.json").read_text())
    out, card = capsys.readouterr().out, (tmp_path / "small" / "README.md").read_text()
    for name, folder in (("teacher", teacher), ("student", tmp_path / "small")):
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        count, row = sum(weights.numel() for weights in plain.parameters()), body["distilled"][name]
        scores = json.loads((folder / "metrics.json").read_text())
        assert row["accuracy"] == pytest.approx(scores["accuracy"], abs=1e-6)
        assert (row["parameters"], row["bytes"]) == (count, 4 * count)
        assert row["examples_per_second"] > 0
        told = rf"{name} +{count:,d} parameters +0\.\d MB   accuracy {row['accuracy']:.4f}   same answer .* examples/s"
        assert re.search(told, out)
        assert f"| {name} | {count:,d} | {4 * count / 1e6:.1f} | " in card
    assert body["distilled"]["teacher"]["same_answer"] == 1


def test_masks_are_filled_by_the_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "the [MASK] was [MASK]"
    (found,) = probe.fill_masks(model, [text], top=3)
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForMaskedLM.from_pretrained(model).eval()
    with torch.no_grad():
        logits = plain(**tokenizer(text, return_tensors="pt")).logits[0]
    for position, best in zip((2, 4), found, strict=True):
        order = logits[position].softmax(-1).sort(descending=True)
        expected = zip(
            tokenizer.convert_ids_to_tokens(order.indices[:3].tolist()), order.values[:3].tolist(), strict=True
        )
        for (token, share), (wanted, value) in zip(best, expected, strict=True):
            assert token == wanted
            assert share == pytest.approx(value, rel=1e-4)
    assert probe.main([str(model), text, "good film", "good film"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(text)
    assert " 1.00   1.00  good film" in out
    assert probe.main([str(model / "none"), text]) == 64
    assert "no config.json there" in capsys.readouterr().err


def test_a_fine_tuned_model_fills_no_gaps(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has lost the head that does: a random one would answer."""
    folder = tuned("rte", tmp_path, model, "epochs=1", "max_len=64")
    capsys.readouterr()
    assert probe.main([str(folder), "the [MASK]"]) == 64
    error = r"error: model=.*/tuned: has no cls\.predictions\.\S+, as filling gaps needs; name another model\n"
    assert re.fullmatch(error, capsys.readouterr().err)
    assert probe.main([str(folder), "good film"]) == 0


def test_mean_states_do_not_see_padding(model: Path) -> None:
    together = probe.mean_states(model, TEXTS)
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    for text, row in zip(TEXTS, together, strict=True):
        with torch.no_grad():
            states = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        mean = states.mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)
