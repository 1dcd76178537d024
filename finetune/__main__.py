"""Entry: `python -m finetune task=classification model=out/books data.train=a.tsv data.dev=b.tsv out=out/task`."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cloze import cli
from cloze.errors import ExitCode, UserError
from finetune.config import FinetuneConfig


def finetune(config: FinetuneConfig) -> dict[str, float]:
    """Fine-tune as `config` says and write its `out`; returns the scores, averaged over the seeds."""
    try:  # here: transformers takes seconds, and --help none of them
        from finetune.train import run

        return run(config)
    except ModuleNotFoundError as error:
        raise UserError(f"task={config.task}: needs {error.name}: pip install 'cloze[finetune]'") from None


def _line(scores: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items())


def run(config: FinetuneConfig) -> int:
    """Fine-tune and tell the scores, and what they stand beside."""
    result = finetune(config)
    if os.environ.get("RANK", "0") != "0":  # of several: one tells
        return ExitCode.OK
    body = json.loads((Path(config.out) / "metrics.json").read_text(encoding="utf-8"))
    print(_line(result))
    unknown = "  ".join(f"data.{name} {share:.1%}" for name, share in body["unk_share"].items())
    print(f"guessing: {_line(body['guessing'])}   [UNK]: {unknown}")
    if "distilled" in body:
        from finetune.side_by_side import lines

        print(*lines(body["distilled"], body["score"]), sep="\n")
    print(f"{config.out}: model, tokenizer, metrics.json and README.md")
    return ExitCode.OK


main = cli.hydra_command("finetune", FinetuneConfig)(run)

if __name__ == "__main__":
    sys.exit(main())
