"""`python -m data_prep.report DIR`: one self-contained HTML page to look at a finished corpus with."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze.cli import command, parser
from cloze.corpus.diagnosis import tell
from cloze.corpus.manifest import read_manifest
from cloze.corpus.report import EARLIER_MARK, PAGE_MARK, of_corpus, report
from cloze.errors import ExitCode, UserError
from cloze.files import write_whole
from cloze.ownership import require_own_file
from cloze.storage import on_disk

REPORT_NAME = "report.html"

PARSER = parser("data_prep.report", "Make a page about a corpus.")
PARSER.add_argument("directory", type=on_disk, help="what `python -m data_prep out=…` made")
PARSER.add_argument("--out", type=Path, help=f"where to write it [DIR/{REPORT_NAME}]")


@command(PARSER)
def main(options: Namespace) -> int:
    """Write the page beside the manifest, or where `--out` says."""
    out: Path = options.out or options.directory / REPORT_NAME
    require_own_file(out, (PAGE_MARK, EARLIER_MARK), "--out ")
    page = report(options.directory).encode()
    try:
        write_whole(out, page)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from error
    tell(of_corpus(options.directory, read_manifest(options.directory)))
    print(f"{out}: {len(page) / 1e3:,.0f} kB")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
