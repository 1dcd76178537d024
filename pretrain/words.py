"""Entry: `python -m pretrain.words model=out/books words=[king,paris]`: what the input embeddings know of words.

Prints the nearest neighbours beside those of random weights, and word similarity where pairs are at hand
(docs/finetuning.md).
"""

import sys

from cloze import cli
from cloze.errors import ExitCode, UserError
from cloze.log import closing
from pretrain.evaluate.frozen_config import WordsConfig


def run(config: WordsConfig) -> int:
    """Print the tables."""
    try:  # here: transformers takes seconds, and --help none of them
        from pretrain.evaluate.word_vectors import report

        print(report(config), end="")
    except ModuleNotFoundError as error:
        raise UserError(f"words need {error.name}: pip install 'cloze[finetune]'") from None
    closing(f"model={config.model}: looked at; nothing is saved")
    return ExitCode.OK


main = cli.hydra_command("words", WordsConfig, positional=("model",))(run)

if __name__ == "__main__":
    sys.exit(main())
