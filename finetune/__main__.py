"""Entry: `python -m finetune task=classification model=out/books data.train=a.tsv data.dev=b.tsv out=out/task`."""

from data_prep import entry
from data_prep.errors import ExitCode
from finetune.config import FinetuneConfig


def main(config: FinetuneConfig) -> int:
    from finetune.classification import run  # here: transformers takes seconds, and --help none of them

    result = run(config)
    print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    print(f"{config.out}: model, tokenizer and metrics.json")
    return ExitCode.OK


if __name__ == "__main__":
    entry.run("finetune", FinetuneConfig, main)
