"""`python -m data_prep.verify DIR`: is a corpus what its manifest says? One line per fault, exit 64 if there is any."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze.cli import command, parser
from cloze.corpus.manifest import read_manifest
from cloze.corpus.report import train_command
from cloze.corpus.verify import faults
from cloze.errors import ExitCode
from cloze.log import closing, log
from cloze.patience import telling
from cloze.storage import on_disk

PARSER = parser("data_prep.verify", "Check a finished corpus: every checksum, count and mask.")
PARSER.add_argument("directory", type=on_disk, help="what `python -m data_prep out=…` made")


@command(PARSER)
def main(options: Namespace) -> int:
    """Print the faults, or that there is none."""
    directory: Path = options.directory
    found = 0
    with telling(f"{directory}: checking"):
        for fault in faults(directory):
            found += 1
            log.error(fault)
    if found:
        return ExitCode.USAGE
    manifest = read_manifest(directory)
    samples = sum(split.samples for split in manifest.splits.values())
    print(f"{directory} is sound: {len(manifest.shards)} shards, {samples:,} samples, every checksum, count and mask")
    closing("", *train_command(directory, manifest))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
