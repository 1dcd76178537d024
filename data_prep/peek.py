"""`python -m data_prep.peek DIR --n 3`: what the model will see, decoded, in colour on a terminal."""

import sys
from argparse import Namespace

from rich.console import Console

from cloze.cli import command, parser
from cloze.corpus.manifest import pass_name
from cloze.corpus.peek import peek
from cloze.errors import ExitCode
from cloze.log import closing
from cloze.storage import on_disk

PARSER = parser(
    "data_prep.peek",
    "Show samples of a finished corpus. shown{answer}: to be predicted is the answer; the model sees [MASK], a random "
    "token, or the answer itself.",
)
PARSER.add_argument("directory", type=on_disk, help="what `python -m data_prep out=…` made")
PARSER.add_argument("--n", type=int, default=3, help="samples to show")
PARSER.add_argument("--split", default=pass_name(0), help="pass-00, pass-01, …, val, or val-NAME")
PARSER.add_argument("--seed", type=int, default=0, help="which samples: the same seed shows the same")


@command(PARSER)
def main(options: Namespace) -> int:
    """Print samples; one line and exit code 64 if that cannot be."""
    console = Console(highlight=False, soft_wrap=True)
    for text in peek(options.directory, options.split, max(0, options.n), abs(options.seed)):
        console.print(text)
    closing("", "python", "-m", "data_prep.report", str(options.directory))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
