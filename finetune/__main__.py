"""Entry: `python -m finetune task=classification model=out/books data.train=a.tsv data.dev=b.tsv out=out/task`."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from cloze import cli
from cloze.errors import ExitCode, UserError
from finetune.config import FinetuneConfig
from finetune.tasks import TASKS, Family

_MODULES = {
    Family.classification: "classification",
    Family.regression: "classification",
    Family.tokens: "tokens",
    Family.qa: "qa",
    Family.summarization: "summarization",
}


def finetune(config: FinetuneConfig) -> dict[str, float]:
    """Fine-tune as `config` says and write its `out`; returns the scores, averaged over the seeds."""
    prepare = preparation(config)
    from finetune import train

    return train.run(config, prepare)


def preparation(config: FinetuneConfig) -> Callable[[FinetuneConfig], Any]:
    """What makes a `train.Prepared` of the task. Imported here: transformers takes seconds, and --help none of them."""
    try:
        return import_module(f"finetune.families.{_MODULES[TASKS[config.task].family]}").prepare  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise UserError(f"task={config.task}: needs {error.name}: pip install 'cloze[finetune]'") from None


def run(config: FinetuneConfig) -> int:
    """Fine-tune and tell the scores."""
    result = finetune(config)
    print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    print(f"{config.out}: model, tokenizer and metrics.json")
    return ExitCode.OK


main = cli.hydra_command("finetune", FinetuneConfig)(run)

if __name__ == "__main__":
    sys.exit(main())
