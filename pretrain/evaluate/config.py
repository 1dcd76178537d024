"""The schema of conf/evaluate/grammar.yaml."""

from dataclasses import dataclass

from cloze.errors import UserError
from cloze.schema import doc


@dataclass(frozen=True, kw_only=True)
class GrammarConfig:
    model: str = doc("exported model, run or checkpoint: what is scored")
    data: list[str] = doc(
        "minimal pairs: files (.jsonl, .txt, .tsv, .csv), folders or zip archives of them, such as BLiMP.zip"
    )
    pairs: int = doc("pairs of each paradigm at most, at even distances; 0 takes all")
    bad_first: bool = doc("in text files of two lines a pair, the ungrammatical sentence stands first, as in Zorro")
    corpus: str | None = doc("prepared corpus whose word frequencies stand beside every score; null: the run's own")
    text: list[str] = doc("held-out text files, a text on each line: their pseudo-perplexity")
    split: str | None = doc("held-out split of the corpus, val or val-NAME: its pseudo-perplexity")
    texts: int = doc("lines or samples to take at most, at even distances; 0 takes all")
    out: str | None = doc("JSON file to write, with everything that is printed and more digits")

    def __post_init__(self) -> None:
        for key in ("pairs", "texts"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)}: cannot be negative")
        if not (self.data or self.text or self.split):
            raise UserError("data: nothing to score; add data=[BLiMP.zip] for minimal pairs, or text=[held-out.txt]")
