"""ONNX and int8 give PyTorch's predictions; the probes give what a loop over Hugging Face's model gives."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from data_prep.errors import UserError
from finetune import compress, probe
from tests.unit.tiny_bert import write_tiny_bert

TEXTS = ["good film", "bad a the very was", "ann met bob", "rome"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"))


def test_onnx_gives_the_logits_for_other_shapes_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(tmp_path / "tuned")
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    monkeypatch.setattr(
        sys, "argv", ["compress", str(tmp_path / "tuned"), str(tmp_path / "out"), str(tmp_path / "texts")]
    )
    assert compress.main() == 0
    assert "model-int8.onnx" in capsys.readouterr().out
    for count, words in ((1, 3), (5, 30)):
        batch = tokenizer([" ".join(["good", "film"] * words)] * count, return_tensors="np")
        with torch.no_grad():
            expected = tuned.eval()(**{name: torch.as_tensor(ids) for name, ids in batch.items()}).logits.numpy()
        for name, tolerance in (("model.onnx", 1e-5), ("model-int8.onnx", 0.05)):
            session = onnxruntime.InferenceSession(tmp_path / "out" / name, providers=["CPUExecutionProvider"])
            np.testing.assert_allclose(session.run(None, dict(batch))[0], expected, atol=tolerance)
    body = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert body["onnx"]["difference"] < 1e-5 < body["onnx_int8"]["difference"]
    assert body["bytes"]["model-int8.onnx"] < body["bytes"]["model.onnx"]
    assert all(body[name]["texts_per_second"] > 0 for name in ("pytorch", "onnx", "onnx_int8"))
    assert compress.main() == 64
    assert capsys.readouterr().err == f"error: {tmp_path}/out: not empty; name another directory\n"
    with pytest.raises(UserError, match=r"none: cannot be read"):
        compress.read_texts(tmp_path / "none")


def test_masks_are_filled_by_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    monkeypatch.setattr(sys, "argv", ["probe", str(model), text, "good film", "good film"])
    assert probe.main() == 0
    out = capsys.readouterr().out
    assert out.startswith(text)
    assert " 1.00   1.00  good film" in out
    monkeypatch.setattr(sys, "argv", ["probe", str(model / "none"), text])
    assert probe.main() == 64
    assert "no config.json there" in capsys.readouterr().err


def test_mean_states_do_not_see_padding(model: Path) -> None:
    together = probe.mean_states(model, TEXTS)
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    for text, row in zip(TEXTS, together, strict=True):
        with torch.no_grad():
            states = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        mean = states.mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)
