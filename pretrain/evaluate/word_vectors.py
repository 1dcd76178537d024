"""What the input embeddings know of words: nearest neighbours, and how far similarity agrees with people's judgement.

Nothing shows more plainly whether a young model has learned anything: neighbours of a fresh model are any words, those
of a trained one have the same word class first, then the same field. Only tokens that are whole words count.
Shapes: V tokens, C whole words, H width, S seeds of random weights.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError, first_line
from cloze.log import log
from pretrain.evaluate import confidence
from pretrain.evaluate.confidence import Interval
from pretrain.evaluate.frozen_config import WordsConfig
from pretrain.evaluate.states import Encoder, Floats, load_encoder, random_encoder
from pretrain.export.card import table

_GENSIM_FILES = {"WordSim-353": "wordsim353.tsv", "SimLex-999": "simlex999.txt"}  # Finkelstein 2001, Hill 2015
_WORD = re.compile(r"[^\W\d_]{2,}|[^\W\d_a-zA-Z]")  # letters: at least two, or one ideograph
_FEWEST_PAIRS = 10


class Similarity(NamedTuple):
    """Spearman of cosine and judgement, in percent."""

    name: str
    num_pairs: int  # both of whose words are tokens
    num_all: int
    model: Interval
    random: tuple[float, ...]


class WordVectors:
    """Unit vectors of the whole words of a vocabulary, [C, H]."""

    def __init__(self, encoder: Encoder) -> None:
        words = whole_words(encoder.tokenizer)
        matrix_VxH = encoder.model.get_input_embeddings().weight.detach().cpu().numpy()
        rows_CxH = matrix_VxH[list(words.values())]
        lengths_C1 = np.linalg.norm(rows_CxH, axis=1, keepdims=True)
        self.words = list(words)
        self.places = {word: place for place, word in enumerate(self.words)}
        self._vectors_CxH: Floats = rows_CxH / np.maximum(lengths_C1, 1e-12)

    def nearest(self, word: str, top: int) -> list[tuple[str, float]]:
        """The `top` words of highest cosine but `word` itself."""
        cosines_C = self._vectors_CxH @ self._vectors_CxH[self.places[word]]
        cosines_C[self.places[word]] = -np.inf
        order = np.argsort(-cosines_C, kind="stable")[: min(top, len(self.words) - 1)]
        return [(self.words[place], float(cosines_C[place])) for place in order]

    def cosines(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float64]:
        firsts, seconds = ([self.places[pair[side]] for pair in pairs] for side in (0, 1))
        return np.asarray((self._vectors_CxH[firsts] * self._vectors_CxH[seconds]).sum(1), np.float64)


def whole_words(tokenizer: object) -> dict[str, int]:
    """Words that are one token at the beginning of a word, each with its id; of spellings that differ in case, all."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()  # type: ignore[attr-defined]
    special = {*tokenizer.all_special_tokens}  # type: ignore[attr-defined]
    mark = next((mark for mark in ("Ġ", "▁") if sum(token.startswith(mark) for token in vocabulary) > 1), "")
    found = {}
    for token, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        word = token.removeprefix(mark)
        if token not in special and token.startswith(mark) and _WORD.fullmatch(word):  # ## is no letter
            found[word] = number
    return found


def report(config: WordsConfig) -> str:
    """Tables in Markdown. Raises `UserError` where no asked word is a token, or a file cannot be read."""
    encoder = load_encoder(Path(config.model), max_len=8)
    others = [random_encoder(encoder, config.seed + number) for number in range(config.random_seeds)]
    own, *random = [WordVectors(one) for one in (encoder, *others)]
    if not own.words:
        raise UserError(f"model={config.model}: its vocabulary has no whole words, only pieces")
    known = [word for asked in config.words if (word := _known(asked, own)) is not None]
    if absent := [word for word in config.words if _known(word, own) is None]:
        log.warning(f"words: not one token of this vocabulary, and left out: {', '.join(absent)}")
    if not known:
        raise UserError(f"words: none is one token of this vocabulary; some that are: {', '.join(own.words[-5:])}")
    head = ["word", "nearest in this model", *(["nearest in random weights"] if random else [])]
    rows = [[word, *(_listed(one.nearest(word, config.top)) for one in (own, *random[:1]))] for word in known]
    parts = [f"{len(own.words):,} whole words\n\n{table(head, rows)}"]
    sets = _similarity_sets(config)
    if sets:
        found = [_similarity(name, path, (own, *random), config.seed) for name, path in sets.items()]
        parts.append(_similarity_table(found))
    return "\n".join(parts)


def _known(word: str, vectors: WordVectors) -> str | None:
    """The word as the vocabulary spells it."""
    return next((one for one in (word, word.lower()) if one in vectors.places), None)


def _listed(neighbours: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {cosine:.2f}" for word, cosine in neighbours)


def _similarity_sets(config: WordsConfig) -> dict[str, Path]:
    """Name and file. Those of gensim are found without importing it."""
    if config.similarity is not None:
        return {Path(file).name: Path(file) for file in config.similarity}
    spec = find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        log.info(
            "word similarity: pip install gensim brings WordSim-353 and SimLex-999, or similarity=[FILE] names one"
        )
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "test" / "test_data"
    return {name: folder / file for name, file in _GENSIM_FILES.items() if (folder / file).is_file()}


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Two words and a number a line, apart by tabs; `#` begins a comment. Raises `UserError` with the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"similarity={path}: cannot be read ({first_line(error)}); a UTF-8 text is needed") from None
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            cells = [cell.strip() for cell in line.split("\t")]
            try:
                first, second, judged = cells[0], cells[1], float(cells[2])
            except (ValueError, IndexError):
                first = ""
            if not (first and second):
                raise UserError(
                    f"similarity={path}: line {number}: {line.strip()[:40]!r}: two words and a number are needed, "
                    "apart by tabs"
                )
            pairs.append((first, second, judged))
    if not pairs:
        raise UserError(f"similarity={path}: holds no pairs")
    return pairs


def _similarity(name: str, path: Path, models: Sequence[WordVectors], seed: int) -> Similarity:
    own, *random = models
    pairs = read_pairs(path)
    both = [(a, b, judged) for x, y, judged in pairs if (a := _known(x, own)) and (b := _known(y, own))]
    if len(both) < _FEWEST_PAIRS:
        raise UserError(
            f"similarity={path}: of {len(pairs)} pairs both words of {len(both)} are tokens: too few to tell"
        )
    judged_N = np.asarray([judged for _, _, judged in both])
    drawn_BxN = confidence.draw_examples(len(both), seed)
    scores = []
    for vectors in (own, *random):
        cosines_N = vectors.cosines([(a, b) for a, b, _ in both])
        scores.append(100 * confidence.spearman(judged_N, cosines_N, drawn_BxN if vectors is own else drawn_BxN[:1]))
    return Similarity(
        name, len(both), len(pairs), confidence.interval(scores[0]), tuple(float(one[0]) for one in scores[1:])
    )


def _similarity_table(found: Sequence[Similarity]) -> str:
    with_random = bool(found[0].random)
    head = ["judged pairs", "pairs known", "Spearman, %", *(["random weights"] if with_random else [])]
    rows = []
    for one in found:
        value, low, high = one.model
        cells = [one.name, f"{one.num_pairs} of {one.num_all}", f"{value:.1f} ({low:.1f} to {high:.1f})"]
        if with_random:
            spread = f" ± {np.std(one.random, ddof=1):.1f}" if len(one.random) > 1 else ""
            cells.append(f"{np.mean(one.random):.1f}{spread}")
        rows.append(cells)
    return table(head, rows)
