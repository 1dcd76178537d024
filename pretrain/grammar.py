"""`python -m pretrain.grammar model=out/books 'data=[BLiMP.zip]' corpus=shards/books`: grammar without fine-tuning.

Accuracy on minimal pairs by pseudo-log-likelihood, beside what word frequencies alone give; and the pseudo-perplexity
of held-out text by the same scores.
"""

import json
import sys
from pathlib import Path

from cloze import cli
from cloze.errors import DiskError, ExitCode
from cloze.files import write_whole
from cloze.ownership import require_own_file
from pretrain.evaluate.config import GrammarConfig


@cli.hydra_command("grammar", GrammarConfig)
def main(config: GrammarConfig) -> int:
    """Print the tables, and write `out`."""
    from pretrain.evaluate.grammar import FORMAT, score  # here: torch takes seconds, and --help none of them

    out = Path(config.out) if config.out else None
    if out:
        require_own_file(out, (f'"{FORMAT}"',), "out=")
    body, lines = score(config)
    print("\n".join(lines))
    if out:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, f"{json.dumps(body, indent=1, ensure_ascii=False)}\n".encode())
        except OSError as error:
            raise DiskError(f"out={out}: {error.strerror}; free space, or name another file") from error
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
