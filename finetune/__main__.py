"""Entry: `python -m finetune task=classification model=out/books data.train=a.tsv data.dev=b.tsv out=out/task`."""

from importlib import import_module

from data_prep import entry
from data_prep.errors import ExitCode, UserError
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
    try:  # here: transformers takes seconds, and --help none of them
        from finetune.train import run

        prepare = import_module(f"finetune.{_MODULES[TASKS[config.task].family]}").prepare
    except ModuleNotFoundError as error:
        raise UserError(f"task={config.task}: needs {error.name}: pip install 'cloze[finetune]'") from None
    return run(config, prepare)


def main(config: FinetuneConfig) -> int:
    result = finetune(config)
    print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    print(f"{config.out}: model, tokenizer and metrics.json")
    return ExitCode.OK


if __name__ == "__main__":
    entry.run("finetune", FinetuneConfig, main)
