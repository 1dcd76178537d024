"""`python -m data_prep.report DIR`: one self-contained HTML page to look at a finished corpus with."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze.cli import command, parser
from cloze.corpus.diagnosis import Level, tell
from cloze.corpus.manifest import read_manifest
from cloze.corpus.report import (
    EARLIER_MARK,
    PAGE_MARK,
    of_corpus,
    report,
    tokens_of,
    train_command,
    words_of,
)
from cloze.corpus.tokenizer import load_tokenizer, save_tokenizer
from cloze.corpus.vocabulary import extended, unknown_words
from cloze.errors import ExitCode, UserError
from cloze.files import write_whole
from cloze.log import closing
from cloze.ownership import require_own_file
from cloze.patience import telling
from cloze.storage import on_disk

REPORT_NAME = "report.html"

PARSER = parser("data_prep.report", "Make a page about a corpus.")
PARSER.add_argument("directory", type=on_disk, help="what `python -m data_prep out=…` made")
PARSER.add_argument(
    "--extend", type=Path, metavar="NEW", help="write the corpus's tokenizer with words added into this new directory"
)
PARSER.add_argument("--words", type=int, default=1000, help="with --extend: so many words, those that save most tokens")
PARSER.add_argument(
    "--into", type=Path, metavar="TOKENIZER", help="with --extend: add this corpus's words to another tokenizer instead"
)
PARSER.add_argument("--out", type=Path, help=f"where to write it [DIR/{REPORT_NAME}]")


@command(PARSER)
def main(options: Namespace) -> int:
    """Write the page beside the manifest, or where `--out` says."""
    out: Path = options.out or options.directory / REPORT_NAME
    require_own_file(out, (PAGE_MARK, EARLIER_MARK), "--out ")
    with telling(f"{options.directory}: reading"):
        page = report(options.directory).encode()
    try:
        write_whole(out, page)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from error
    manifest = read_manifest(options.directory)
    tell(found for found in of_corpus(options.directory, manifest) if found.level is not Level.note)  # the page has all
    print(f"{out}: {len(page) / 1e3:,.0f} kB")
    if options.extend:
        print(_extend(options.directory, options.extend, options.words, options.into))
    elif options.into:
        raise UserError(f"--into {options.into}: says whose words to extend; name a new directory with --extend")
    closing(f"{out}: open it in a browser", *train_command(options.directory, manifest))
    return ExitCode.OK


def _extend(directory: Path, new: Path, count: int, into: Path | None) -> str:
    """Write the extended tokenizer, the corpus's own or `into`; one line that says what it has more."""
    if count < 1:
        raise UserError(f"--words {count}: must be at least 1")
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise UserError(f"--extend {new}: is there; name a new directory")
    manifest, tokenizer = read_manifest(directory), load_tokenizer(directory / "tokenizer")
    if into:
        own, tokenizer = tokenizer, load_tokenizer(into)
        unknown = unknown_words(tokens_of(directory, manifest), own, tokenizer)
        words = [*unknown][:count]
        saved = f"{sum(unknown[word] for word in words) / max(1, sum(unknown.values())):.1%} of what it cut or knew not"
    else:
        found = words_of(directory, manifest, tokenizer)
        words = [word.text for word in found.cut[:count]]
        saved = f"{found.saved(count):.1%} of the tokens fewer"
    if not words:
        raise UserError(f"--extend {new}: no word of {directory} is cut that comes twice; its tokenizer does as it is")
    larger = extended(tokenizer, words)
    new.mkdir(parents=True, exist_ok=True)
    save_tokenizer(larger, new, manifest.max_len)
    rows = larger.facts.vocab_size - tokenizer.facts.vocab_size
    return (
        f"{new}: {len(words):,} words added, {rows:,} of them in new rows; {saved}; prepare with tokenizer.path={new}"
    )


if __name__ == "__main__":
    sys.exit(main())
