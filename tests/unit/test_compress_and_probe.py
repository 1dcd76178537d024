"""ONNX and int8 give PyTorch's predictions; the probes give what a loop over Hugging Face's model gives."""

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from finetune import compress as command
from finetune import predict, probe
from finetune.__main__ import finetune
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


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("rte", ("epochs=4",)), ("stsb", ("epochs=4",)), ("squad", ("epochs=4", "max_len=24", "stride=4")),
        ("ner", ("epochs=8",)), ("ner", ("epochs=8", "head=crf", "optim.crf_lr=0.1")),
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
    for rest, error in (
        (arguments, f"{tmp_path}/out: not empty; name another directory"),
        (
            [str(model), str(tmp_path / "b")],
            f"{model}: has no metrics.json; name a directory that `python -m finetune` wrote",
        ),
    ):
        assert command.main(rest) == 64
        assert capsys.readouterr().err == f"error: {error}\n"
    (folder / "model.safetensors").unlink()
    assert command.main([str(folder), str(tmp_path / "b"), *arguments[2:]]) == 64
    assert re.fullmatch(r"error: model=.*: cannot be loaded .*\n", capsys.readouterr().err)
    assert not (tmp_path / "b").exists()


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
