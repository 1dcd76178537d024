"""`python -m pretrain.export runs/books out/books`: a checkpoint as a Hugging Face directory, also on the hub."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze import cli
from cloze.errors import ExitCode
from cloze.log import closing
from cloze.patience import telling

PARSER = cli.parser("pretrain.export", "Checkpoint -> Hugging Face.")
PARSER.add_argument("run", type=Path, help="run directory, or one checkpoint of it")
PARSER.add_argument("out", type=Path, help="directory to write")
PARSER.add_argument("--force", action="store_true", help="replace the export that stands at OUT")
PARSER.add_argument(
    "--average", type=int, default=1, metavar="N", help="the mean of the newest N checkpoints' weights [1: the newest]"
)
PARSER.add_argument("--push", metavar="USER/NAME", help="upload it to the Hugging Face hub, too")
PARSER.add_argument("--public", action="store_true", help="with --push: for everybody to see")


@cli.command(PARSER)
def main(options: Namespace) -> int:
    from pretrain.export import (
        card,  # here: transformers takes seconds, and --help none of them
        hugging_face,
    )

    hugging_face.be_quiet()
    with telling(f"{options.run}: exporting"):
        difference = hugging_face.export(options.run, options.out, force=options.force, average=options.average)
    print(f"{options.out}: exported; logits equal the trainer's (largest difference {difference:.1e})")
    if options.push:
        print(f"pushed to {card.push(options.out, options.push, private=not options.public)}")
    closing(f"{options.out}: saved", "python", "-m", "pretrain.words", f"model={options.out}")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
