"""Entry: `python -m finetune task=classification model=out/books data.train=a.tsv data.dev=b.tsv out=out/task`."""

import os
import sys

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


def run(config: FinetuneConfig) -> int:
    """Fine-tune and tell the scores."""
    result = finetune(config)
    if os.environ.get("RANK", "0") != "0":  # of several: one tells
        return ExitCode.OK
    print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    print(f"{config.out}: model, tokenizer and metrics.json")
    return ExitCode.OK


main = cli.hydra_command("finetune", FinetuneConfig)(run)

if __name__ == "__main__":
    sys.exit(main())
