"""`python -m pretrain.grammar model=out/books 'data=[BLiMP.zip]' corpus=shards/books`: grammar without fine-tuning.

Accuracy on minimal pairs by pseudo-log-likelihood, beside what word frequencies alone give; and the pseudo-perplexity
of held-out text by the same scores.
"""

import sys

from cloze import cli
from cloze.errors import ExitCode
from cloze.patience import telling
from pretrain.evaluate import results
from pretrain.evaluate.config import GrammarConfig


@cli.hydra_command("grammar", GrammarConfig, positional=("model",))
def main(config: GrammarConfig) -> int:
    """Print the tables, and write `out`."""
    from pretrain.evaluate.grammar import score  # here: torch takes seconds, and --help none of them

    results.refuse_foreign(config.out, results.GRAMMAR)
    with telling(f"model={config.model}: scoring"):
        body, lines = score(config)
    print("\n".join(lines))
    results.write(config.out, body)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
