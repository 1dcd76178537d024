"""`python -m pretrain.report runs/a [runs/b …]`: one self-contained HTML page about one run, or over several."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from cloze.cli import command, parser
from cloze.errors import ExitCode
from cloze.log import log
from cloze.patience import telling
from pretrain.telemetry.charts import AXES
from pretrain.telemetry.report import COMPARISON_NAME, REPORT_NAME, write_report

PARSER = parser("pretrain.report", "One HTML page about one run, or over several side by side.")
PARSER.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN", help="run directory, such as runs/demo")
PARSER.add_argument(
    "--out", type=Path, help=f"page to write [{REPORT_NAME} in the run; of several {COMPARISON_NAME} beside the first]"
)
PARSER.add_argument("--x", choices=AXES, default="step", help="what curves are drawn over at first")

_SERVE = ("python", "-m", "pretrain.runs", "serve")


@command(PARSER)
def main(options: Namespace) -> int:
    """Write the page; its path goes to stdout."""
    first = options.run_dirs[0]
    usual = first / REPORT_NAME if len(options.run_dirs) == 1 else first.resolve().parent / COMPARISON_NAME
    with telling("reading"):
        page = write_report(options.run_dirs, options.out or usual, axis=options.x)
    print(page)
    log.info("open it in a browser; live pages of all runs: " + shlex.join([*_SERVE, "--root", str(first.parent)]))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
