"""Looking into a corpus, wherever it lies: its length, its samples as arrays and as text, masks of any epoch.

Epoch e of a training reads pass e mod P of the P passes, with draw e div P of the masks: the draw that the shards hold,
else the same function live. What training reads stands here sample by sample, in the order of the shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from cloze import storage
from cloze.corpus.manifest import NAME, Manifest, parse_manifest, pass_name, read_manifest
from cloze.corpus.shards import Split, masks_of
from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer
from cloze.errors import UserError

_REMOTE_BLOCKS = 64  # that are kept: of each, what was fetched stays in memory
_IGNORED = -100  # as torch's cross-entropy has it
_TOKENIZER_FILES = "tokenizer.json", "vocab.txt"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample of T tokens, M of which are to be predicted in this epoch."""

    id: int  # the same in every epoch
    tokens_T: npt.NDArray[np.integer]  # u16, or u32 where the vocabulary needs it: with specials, unmasked
    segment_ids_T: npt.NDArray[np.uint8]  # token types: 0 through the first segment, then 1 where there are types
    label: int  # 1 = the second segment comes from another document (nsp), or the two are swapped (sop)
    masked_positions_M: npt.NDArray[np.uint16]
    masked_tokens_M: npt.NDArray[np.integer]  # what the model sees there: [MASK], a random token or the answer

    @property
    def input_ids_T(self) -> npt.NDArray[np.integer]:
        """What the model sees."""
        shown_T = self.tokens_T.copy()
        shown_T[self.masked_positions_M] = self.masked_tokens_M
        return shown_T

    @property
    def labels_T(self) -> npt.NDArray[np.int64]:
        """The answer at masked positions, -100 elsewhere."""
        labels_T = np.full(len(self.tokens_T), _IGNORED, np.int64)
        labels_T[self.masked_positions_M] = self.tokens_T[self.masked_positions_M]
        return labels_T


class MaskedSplit:
    """The samples of one split, with the masks of one draw, by index."""

    def __init__(self, split: Split, manifest: Manifest, draw: int) -> None:
        self.name, self.draw = split.name, draw
        self._split, self._manifest = split, manifest

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Sample:
        """Raises `IndexError` outside the split, and `CorruptShard` where its block is not the manifest's."""
        index = index + len(self) if index < 0 else index
        samples = self._split.gather(np.asarray([index], np.int64), self.draw)
        masks = masks_of(samples, self._manifest, self.draw)
        first, total = samples.lengths_Nx2[0].tolist()
        return Sample(
            id=int(samples.ids_N[0]),
            tokens_T=samples.tokens_T,
            segment_ids_T=((np.arange(total) >= first) & self._manifest.tokenizer.token_types).astype(np.uint8),
            label=int(samples.random_next_N[0]),
            masked_positions_M=masks.positions_M,
            masked_tokens_M=masks.tokens_M,
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class Corpus:
    """A finished corpus at a path or URL. Its length is that of all passes together."""

    def __init__(self, location: str | Path, manifest: Manifest) -> None:
        self.location, self.manifest = location, manifest
        self._splits: dict[str, Split] = {}
        self._tokenizer: CorpusTokenizer | None = None

    def __len__(self) -> int:
        return sum(self.manifest.splits[pass_name(number)].samples for number in range(self.manifest.passes))

    def epoch(self, number: int) -> MaskedSplit:
        """What training reads in its epoch `number`, counted from 0."""
        return self.split(pass_name(number % self.manifest.passes), epoch=number)

    def split(self, name: str, *, epoch: int = 0) -> MaskedSplit:
        """The samples of `pass-00`, `pass-01`, …, `val` or `val-NAME`, with the masks that epoch `epoch` draws.

        Evaluation reads what is held out with those of epoch 0. Raises `UserError` where there is no such split.
        """
        if name not in self.manifest.splits:
            raise UserError(f"{name}: no split of {self.location}; there are {', '.join(self.manifest.splits)}")
        if name not in self._splits:
            options = {"cached_blocks": _REMOTE_BLOCKS} if isinstance(self.location, str) else {}
            self._splits[name] = Split(self.location, self.manifest, name, **options)
        return MaskedSplit(self._splits[name], self.manifest, epoch // self.manifest.passes)

    @property
    def tokenizer(self) -> CorpusTokenizer:
        """The one that the samples were made with. Raises `UserError` where it is missing."""
        if self._tokenizer is None:
            self._tokenizer = (
                _remote_tokenizer(self.location)
                if isinstance(self.location, str)
                else load_tokenizer(self.location / "tokenizer")
            )
        return self._tokenizer

    def text(self, sample: Sample, *, masked: bool = False) -> str:
        """A sample in words: `[CLS] … [SEP] … [SEP]`, as it was written or, `masked`, as the model sees it."""
        tokens_T = sample.input_ids_T if masked else sample.tokens_T
        return str(self.tokenizer.backend.decode(tokens_T.tolist(), skip_special_tokens=False))


def open_corpus(path_or_url: str | Path) -> Corpus:
    """The corpus in a directory or at an fsspec URL; of a remote one each block is fetched by range when it is needed.

    Raises `UserError` where there is no finished corpus, or its manifest is damaged.
    """
    place = str(path_or_url).rstrip("/")
    if not storage.is_remote(place):
        directory = storage.local_path(str(path_or_url))
        return Corpus(directory, read_manifest(directory))
    data = storage.download(f"{place}/{NAME}")
    if data is None:
        raise UserError(f"{place}/{NAME}: not there; name a corpus that `python -m data_prep` finished")
    return Corpus(place, parse_manifest(data, f"{place}/{NAME}"))


def _remote_tokenizer(url: str) -> CorpusTokenizer:
    with TemporaryDirectory() as folder:
        for name in _TOKENIZER_FILES:
            if (data := storage.download(f"{url}/tokenizer/{name}")) is not None:
                (Path(folder) / name).write_bytes(data)
                return load_tokenizer(Path(folder))
    raise UserError(f"{url}/tokenizer: holds neither {' nor '.join(_TOKENIZER_FILES)}; upload the corpus again")
