"""`python -m pretrain.report runs/a [runs/b …]`: one self-contained HTML page about one run, or over several."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze.cli import command, parser
from cloze.errors import ExitCode
from pretrain.telemetry.report import REPORT_NAME, write_report
from pretrain.telemetry.sinks import AXES

PARSER = parser("pretrain.report", "One HTML page about one run, or over several.")
PARSER.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN", help="run directory, such as runs/demo")
PARSER.add_argument("--out", type=Path, help=f"page to write [the first run's {REPORT_NAME}]")
PARSER.add_argument("--x", choices=("step", *AXES), default="step", help="what curves are drawn over")


@command(PARSER)
def main(options: Namespace) -> int:
    """Write the page; its path goes to stdout."""
    print(write_report(options.run_dirs, options.out or options.run_dirs[0] / REPORT_NAME, axis=options.x))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
