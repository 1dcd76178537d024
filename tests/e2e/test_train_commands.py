"""The command lines that a user types: real launchers, fresh processes, whole interpreters from start to end."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

from cloze import cli
from cloze.corpus.manifest import read_manifest
from cloze.corpus.tokenizer import load_tokenizer
from pretrain import checkpoint
from pretrain.config import TrainConfig
from pretrain.data.loader import TrainingCorpus
from pretrain.export import __main__ as export
from pretrain.model.bert import PackedBert
from tests.support import ROOT, TINY, environment, free_port, later_wins, make_corpus, read_metrics

DEEPSPEED = (str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2")
BY_FILE = (*DEEPSPEED, "--master_port", "{port}", str(ROOT / "pretrain" / "train.py"))
BY_MODULE = (*DEEPSPEED, "--master_port", "{port}", "--module", "pretrain.train")
ALONE = (sys.executable, "-m", "pretrain.train")


class Command:
    """A running command line in a directory of its own, by which its processes are known."""

    def __init__(self, command: tuple[str, ...], cwd: Path, *overrides: str) -> None:
        self.cwd, self.stderr = cwd, cwd / "stderr"
        argv = [part.format(port=free_port()) for part in command]
        with (cwd / "stdout").open("w") as out, self.stderr.open("w") as err:
            argv += later_wins(*TINY, *overrides)
            self.process = subprocess.Popen(
                argv, cwd=cwd, env=environment(), stdout=out, stderr=err, start_new_session=True
            )

    def wait(self, timeout: float = 100.0) -> int:
        return self.process.wait(timeout)

    def wait_for(self, step: int) -> None:
        end = time.monotonic() + 200
        while not any(line["step"] >= step for line in read_metrics(self.cwd / "runs" / "r")):
            assert self.process.poll() is None, self.stderr.read_text()
            assert time.monotonic() < end, self.stderr.read_text()
            time.sleep(0.05)

    def wait_for_words(self, words: str) -> None:
        end = time.monotonic() + 100
        while words not in self.stderr.read_text():
            assert time.monotonic() < end, self.stderr.read_text()
            time.sleep(0.05)

    def processes(self, words: str = "") -> list[psutil.Process]:
        """The living processes of this command whose command line holds `words`."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.cwd) and process.status() != psutil.STATUS_ZOMBIE:
                    found += [process] if words in " ".join(process.cmdline()) else []
        return found

    def all_gone(self, seconds: float = 10.0) -> bool:
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.processes()


@contextmanager
def started(command: tuple[str, ...], cwd: Path, *overrides: str) -> Iterator[Command]:
    running = Command(command, cwd, *overrides)
    try:
        yield running
    finally:
        for process in running.processes():
            with suppress(psutil.Error):
                process.kill()
        running.process.wait(10)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run by `deepspeed pretrain/train.py` from elsewhere, with relative paths."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(corpus, cwd / "shards")
    overrides = ("data.path=shards", "run=r", "zero=2", "data.workers=1", "checkpoint.every=3", "deepspeed.extra=null")
    with started(BY_FILE, cwd, *overrides) as command:
        assert command.wait() == 0, command.stderr.read_text()
        assert command.all_gone()
    return cwd


@pytest.mark.slow
def test_deepspeed_with_plain_overrides_from_another_directory(finished: Path) -> None:
    run = finished / "runs" / "r"
    assert sorted(path.name for path in finished.iterdir()) == ["runs", "shards", "stderr", "stdout"]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
    ]
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert json.loads((run / "status.json").read_text())["exit_code"] == 0
    stderr = (finished / "stderr").read_text()
    assert "2 x cpu (1 thread each), ZeRO 2, fp32: global batch 16 = 2 ranks x 2 accumulation" in stderr
    assert "Warning" not in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_sigterm_to_one_rank_under_the_launcher(corpus: Path, tmp_path: Path) -> None:
    """Both ranks stop at one step with exit 75 and a checkpoint, and no process is left."""
    with started(BY_MODULE, tmp_path, f"data.path={corpus}", "run=r", "steps=100000", "data.workers=1") as command:
        command.wait_for(3)
        ranks = [process for process in command.processes("pretrain.train") if "--local_rank=1" in process.cmdline()]
        # The launcher's own command lines hold the words too: the rank is the one without a child of its kind.
        (rank,) = [process for process in ranks if "deepspeed.launcher" not in " ".join(process.cmdline())]
        rank.send_signal(signal.SIGTERM)
        assert command.wait() == 75, command.stderr.read_text()
        assert command.all_gone()
    run = tmp_path / "runs" / "r"
    (path,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoint.verify(path) == []
    assert path == checkpoint.path_of(run / "checkpoints", read_metrics(run)[-1]["step"])
    assert "Traceback" not in command.stderr.read_text()


@pytest.mark.parametrize(
    ("target", "number"),
    [
        pytest.param(
            target, number, marks=() if (target, number) == ("launch.py", signal.SIGTERM) else pytest.mark.slow
        )
        for target, number in itertools.product(
            ("runner", "launch.py"), (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        )
    ],
)
def test_a_signal_to_a_launcher(corpus: Path, tmp_path: Path, target: str, number: int) -> None:
    """deepspeed's own exit codes tell nothing then. The ranks stop at one step, with a checkpoint, and all are gone."""
    with started(BY_MODULE, tmp_path, f"data.path={corpus}", "run=r", "steps=100000", "data.workers=1") as command:
        command.wait_for(3)
        runner = psutil.Process(command.process.pid)
        (runner if target == "runner" else runner.children()[0]).send_signal(number)
        command.wait()
        assert command.all_gone(60)
    run = tmp_path / "runs" / "r"
    assert json.loads((run / "status.json").read_text())["exit_code"] == 75
    (path,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoint.verify(path) == []
    assert path == checkpoint.path_of(run / "checkpoints", read_metrics(run)[-1]["step"])


@pytest.mark.slow
def test_a_damaged_shard_under_the_launcher(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", samples=160, samples_per_block=2, shards_per_split=1, val=0)
    path = tmp_path / "corpus" / "pass-00" / "000000.tar"
    data = bytearray(path.read_bytes())
    data[read_manifest(tmp_path / "corpus").split_shards("pass-00")[0].blocks.offsets[40] + 600] ^= 1
    path.write_bytes(data)
    with started(BY_FILE, tmp_path, "data.path=corpus", "run=r", "steps=100", "data.workers=1") as command:
        command.wait_for_words("checksum differs")
        assert command.wait(20) == 64, command.stderr.read_text()  # the launcher gives a rank 30 s to go
        assert command.all_gone()
    lines = [line for line in command.stderr.read_text().splitlines() if "error: " in line and "pass-00" in line]
    assert 1 <= len(lines) <= 2  # one from each rank that read it
    assert all("pass-00/000000.tar: block 40: its checksum differs from the manifest's" in line for line in lines)


@pytest.mark.slow
def test_a_mistyped_hostfile_is_not_trained_without(corpus: Path, tmp_path: Path) -> None:
    """DeepSpeed warns, among its other lines, and would train on this machine alone."""
    by_hostfile = (DEEPSPEED[0], "--hostfile", "hosts.txt", *DEEPSPEED[1:], *BY_FILE[len(DEEPSPEED) :])
    with started(by_hostfile, tmp_path, f"data.path={corpus}", "run=r") as command:
        assert command.wait() == 64, command.stderr.read_text()
        assert command.all_gone()
    (line,) = (line for line in command.stderr.read_text().splitlines() if line.startswith("error: "))
    assert line.startswith("error: --hostfile=hosts.txt: not there, and deepspeed would train on this machine alone")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "code"),
    [(["stop_at=2", "data.workers=1"], 75), (["global_batch_size=15"], 64)],
)
def test_one_process(corpus: Path, tmp_path: Path, overrides: list[str], code: int) -> None:
    """Without a launcher; with the end of a whole interpreter."""
    with started(ALONE, tmp_path, f"data.path={corpus}", "run=r", *overrides) as command:
        assert command.wait() == code, command.stderr.read_text()
        assert command.all_gone()
    assert "Traceback" not in command.stderr.read_text()
    assert "Warning" not in command.stderr.read_text()
    assert command.stderr.read_text().count("error: ") == (code == 64)


# Export


@pytest.fixture(scope="module")
def exported(finished: Path) -> Path:
    """By the command; what it refuses is asked of its main function: each start costs seconds."""
    command = [sys.executable, "-m", "pretrain.export", "runs/r", "out/r"]
    done = subprocess.run(command, cwd=finished, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "logits equal the trainer's" in done.stdout
    assert done.stderr == "out/r: saved; next: python -m pretrain.words model=out/r\n"
    return finished / "out" / "r"


@pytest.mark.slow
def test_the_export_is_hugging_faces(exported: Path, finished: Path) -> None:
    newest = finished / "runs" / "r" / "checkpoints" / "step-00000006"
    weights = load_file(newest / "model.safetensors")
    vocab_size = TrainingCorpus(finished / "shards").manifest.tokenizer.vocab_size
    rows = "bert.embeddings.word_embeddings.weight"
    assert len(weights[rows]) == 64
    for kind in (AutoModelForPreTraining, AutoModelForMaskedLM):
        model = kind.from_pretrained(exported)
        own = dict(model.named_parameters())
        assert own[rows].shape == (vocab_size, 32)
        assert model.config.vocab_size == vocab_size
        assert own["cls.predictions.bias"].shape == (vocab_size,)
        for name, parameter in own.items():
            assert torch.equal(parameter.detach(), weights[name][: len(parameter)]), name
    assert not [path for path in exported.rglob("*") if path.suffix in (".bin", ".pkl", ".pt")]
    assert "| steps | 6 |" in (exported / "README.md").read_text()  # the model card, from this run


@pytest.mark.slow
def test_the_exported_tokenizer_is_the_corpus_s(exported: Path, finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours = load_tokenizer(finished / "shards" / "tokenizer")
    text = "A word of letters, and [MASK]"
    assert len(tokenizer) == ours.facts.vocab_size
    assert tokenizer("some letters").input_ids == ours.backend.encode("some letters").ids
    assert tokenizer.mask_token_id == ours.facts.mask_id
    assert tokenizer.mask_token_id in tokenizer(text).input_ids


@pytest.mark.slow
def test_exported_logits_equal_the_trainers(exported: Path, finished: Path) -> None:
    """On the training data itself, sample by sample."""
    corpus = TrainingCorpus(finished / "shards")
    reference = AutoModelForPreTraining.from_pretrained(exported).eval()
    model_config = cli.compose("train", TrainConfig, [*TINY, "run=r", "data.path=d"]).model
    trained = PackedBert(model_config, corpus.manifest.tokenizer, max_len=24)
    trained.load_weights(load_file(finished / "runs" / "r" / "checkpoints" / "step-00000006" / "model.safetensors"))
    trained.eval()
    for index in range(5):
        batch = corpus.val_batch(np.asarray([index]))
        with torch.no_grad():
            mlm, nsp = trained(batch)
            theirs = reference(input_ids=batch.input_ids_T[None], token_type_ids=batch.token_type_ids_T[None])
        torch.testing.assert_close(mlm, theirs.prediction_logits[0, batch.masked_index_M], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(nsp, theirs.seq_relationship_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_export_refuses(
    exported: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    written = (exported / "model.safetensors").stat().st_mtime_ns
    assert export.main(["runs/r", "out/r"]) == 0  # it is there already
    assert (exported / "model.safetensors").stat().st_mtime_ns == written
    capsys.readouterr()
    assert export.main(["runs/r/checkpoints/step-00000003", "out/r"]) == 64
    assert capsys.readouterr().err == "error: out/r: not empty; name another directory, or add --force to replace it\n"
    before = sorted(path.name for path in exported.iterdir())
    assert export.main(["runs/r/checkpoints/step-00000003", "out/r", "--force"]) == 0
    assert sorted(path.name for path in exported.iterdir()) == before
    capsys.readouterr()
    assert export.main(["shards", "out/s"]) == 64
    assert capsys.readouterr().err.count("\n") == 1
    assert not (finished / "out" / "s").exists()
    assert [path.name for path in (finished / "out").iterdir()] == ["r"]
