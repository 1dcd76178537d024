"""`python -m finetune.report out/sst2`: the page of a fine-tuned model, anew, with what was tried since beside it."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze import cli
from cloze.errors import ExitCode
from cloze.log import closing
from finetune.page import NAME, write_page

PARSER = cli.parser("finetune.report", "The page of a fine-tuned model: what it scores, what it gets wrong.")
PARSER.add_argument("model", type=Path, help="directory that `python -m finetune` wrote")
PARSER.add_argument("--out", type=Path, help=f"page to write [{NAME} in the directory]")


@cli.command(PARSER)
def main(options: Namespace) -> int:
    """Write the page; its path goes to stdout."""
    page = write_page(options.model, options.model.resolve(), options.out)
    print(page)
    closing(f"{page}: open it in a browser")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
