"""Neighbours of words are those of a loop; files of judged pairs are read, and their faults are one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, PreTrainedTokenizerFast

from cloze.errors import ExitCode
from pretrain.evaluate.states import load_encoder
from pretrain.evaluate.word_vectors import WordVectors, read_pairs, whole_words
from pretrain.words import main
from tests.unit.tiny_bert import write_tiny_bert

WORDS = ["good", "bad", "film", "##s", "a", "the", "3d", "ann", "met", "電", "?", "king", "queen", "man", "boy", "rome"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which `king` and `queen` point the same way, `man` and `boy` too."""
    folder = write_tiny_bert(tmp_path_factory.mktemp("model"), words=WORDS)
    bert = BertModel.from_pretrained(folder)
    with torch.no_grad():
        rows = bert.embeddings.word_embeddings.weight
        rows[5 + WORDS.index("queen")] = 2 * rows[5 + WORDS.index("king")]
        rows[5 + WORDS.index("boy")] = rows[5 + WORDS.index("man")] + 0.001
    bert.save_pretrained(folder)
    return folder


def test_whole_words_of_any_tokenizer(model: Path) -> None:
    assert list(whole_words(load_encoder(model, 8).tokenizer)) == [
        word for word in WORDS if word not in ("##s", "a", "3d", "?")
    ]
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "Ġgood": 1, "good": 2, "Ġthe": 3, "s": 4, "Ġ?": 5}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert whole_words(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")) == {"good": 1, "the": 3}


def test_neighbours_are_those_of_a_loop(model: Path) -> None:
    encoder = load_encoder(model, 8)
    vectors, words = WordVectors(encoder), whole_words(encoder.tokenizer)
    rows = encoder.model.get_input_embeddings().weight.detach()
    for word in words:
        cosines = {
            other: float(torch.cosine_similarity(rows[words[word]], rows[number], dim=0))
            for other, number in words.items()
            if other != word
        }
        found = vectors.nearest(word, 3)
        assert [other for other, _ in found] == sorted(cosines, key=lambda other: -cosines[other])[:3]
        np.testing.assert_allclose([cosine for _, cosine in found], [cosines[other] for other, _ in found], atol=1e-5)


def test_tables(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [("king", "queen", 9), ("man", "boy", 8), ("Ann", "met", 1), ("good", "film", 0.5), ("king", "xyz", 5)]
    lines = [f"{a}\t{b}\t{number}" for a, b, number in pairs]
    (tmp_path / "pairs.tsv").write_text("# judged\n" + "\n".join(lines * 3) + "\n")
    given = [f"model={model}", "words=[king,Man,xyz]", "top=1", "random_seeds=2"]
    assert main([*given, f"similarity=[{tmp_path}/pairs.tsv]"]) == ExitCode.OK
    out, error = capsys.readouterr()
    assert "| king | queen 1.00 | " in out
    assert "| man | boy 1.00 | " in out
    assert "left out: xyz" in error
    (row,) = [line for line in out.split("\n") if line.startswith("| pairs.tsv")]
    assert "| 12 of 15 |" in row
    assert float(row.split(" | ")[2].split()[0]) > 80, "these pairs were made similar"


def test_faults_are_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.tsv"
    for data, line in (
        (b"king\tqueen\t9\nking\tqueen\n", "line 2: 'king\\tqueen': two words and a number are needed"),
        (b"king\tqueen\thigh\n", "line 1: 'king\\tqueen\\thigh': two words and a number"),
        (b"# nothing\n", "holds no pairs"),
        (b"k\xf6nig\tqueen\t1\n", "cannot be read ('utf-8' codec"),
        (b"king\tqueen\t9\n", "of 1 pairs both words of 1 are tokens: too few to tell"),
    ):
        file.write_bytes(data)
        assert main([f"model={model}", "words=[king]", f"similarity=[{file}]"]) == ExitCode.USAGE
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    file.write_text("\ufeffa\tb\t1.5\r\n")
    assert read_pairs(file) == [("a", "b", 1.5)]
    assert main([f"model={model}", "words=[xyz]"]) == ExitCode.USAGE
    assert "words: none is one token of this vocabulary; some that are: king, queen" in capsys.readouterr().err
