"""`python -m finetune.grid out/grid`: what a grid gave, as a table of what varies and of the scores, the best first."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloze import cli
from cloze.errors import ExitCode, UserError
from cloze.log import closing
from finetune.resume import metrics
from finetune.tried import markdown

PARSER = cli.parser("finetune.grid", "Fine-tuned models as a table in Markdown: what varies, and the scores.")
PARSER.add_argument("folders", type=Path, nargs="+", help="what `python -m finetune` wrote, or what holds such")


def found(folders: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The metrics.json of every fine-tuned model in or below the folders. Raises `UserError` where one has none."""
    bodies: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        own = {path.parent: metrics(path.parent) for path in sorted(folder.rglob("metrics.json"))}
        here = {path: body for path, body in own.items() if body is not None and ".unfinished" not in str(path)}
        if not here:
            raise UserError(f"{folder}: holds no model that `python -m finetune` wrote; name its out")
        bodies |= here
    return bodies


@cli.command(PARSER)
def main(options: Namespace) -> int:
    bodies = found(options.folders)
    print(markdown(bodies), end="")
    closing(f"{len(bodies)} models; nothing is saved")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
