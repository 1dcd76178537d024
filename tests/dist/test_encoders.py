"""Tiny encoders of each architecture by Hugging Face: gone on from on two ranks, killed, resumed, exported."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from pretrain.export.hugging_face import export, load_hugging_face
from tests.support import Trainer, make_corpus
from tests.unit.test_initialize import KINDS, source_of

CLASSES = {
    "bert": "BertForPreTraining",
    "roberta": "RobertaForMaskedLM",
    "xlm-roberta": "XLMRobertaForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
}
CURRICULUM = "model.distance_bias=[[0,1],[0.5,0.01],[0.5,0]]"
EXTRA = {"modernbert": "model.extra={local_attention:8,global_rope_theta:5000.0}"}  # its positions need no curriculum
KILLED = """
import os, signal, time
from pathlib import Path
from pretrain.model.bert import PackedBert

calls, real = 0, PackedBert.forward

def forward(self, batch):
    global calls
    calls += 1
    if calls == 25:  # of its 40 micro-batches
        while not list(Path({root!r}).glob("run/checkpoints/step-00000010/*")):  # written beside the steps
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch)

PackedBert.forward = forward
"""


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("singles") / "corpus"
    path.mkdir()
    make_corpus(path, objective="none")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        pytest.param(kind, zero, marks=[] if (kind, zero) == ("roberta", 3) else pytest.mark.slow)
        for kind in CLASSES
        for zero in (1, 3)
    ],
)
def test_a_published_encoder_is_gone_on_from(
    trainer: Trainer, singles: Path, tmp_path: Path, kind: str, zero: int
) -> None:
    learned = {"max_position_embeddings": 41 if "roberta" in kind else 40, "pad_token_id": 0}
    source = source_of(tmp_path, kind, **learned)
    (source / "vocab.txt").unlink()
    shutil.copytree(singles / "tokenizer", source, dirs_exist_ok=True)
    overrides = (
        f"data.path={singles}", f"init_from={source}", f"zero={zero}", f"runs_root={tmp_path}", "steps=20",
        f"model.architecture={KINDS[kind][0].value}", "model.num_heads=4", "model.max_positions=40",
        EXTRA.get(kind, CURRICULUM), "checkpoint.every=5", "optim.lr=0.01",
    )  # fmt: skip
    killed = trainer.run(*overrides, ranks=2, before=KILLED.format(root=str(tmp_path)))
    assert killed.codes == (-9, -9), killed.stderrs
    assert f"weights from {source}" in killed.stderr
    shutil.rmtree(source)  # a resumed run needs it no more
    result = trainer.run(*overrides, ranks=2)
    assert result.codes == (0, 0), result.stderrs
    assert "resuming at step 10 of 20" in result.stderr
    losses = result.series("train/loss")
    assert len(losses) == 20
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.25

    out = tmp_path / "out"
    assert export(result.run, out) < 1e-4  # packed against padded logits
    assert json.loads((out / "config.json").read_text())["architectures"] == [CLASSES[kind]]
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(["a b c", "d"], padding=True, return_tensors="pt")
    assert ("token_type_ids" in inputs) == (kind == "bert")
    with torch.no_grad():
        logits = model(**inputs).logits
        again = load_hugging_face(result.run)(**inputs)
    torch.testing.assert_close(logits, again.prediction_logits if kind == "bert" else again.logits)
