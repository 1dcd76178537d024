"""`python -m pretrain.runs [list | diff A B | follow A | serve]`: the runs under a directory, and what they do now."""

import json
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from cloze.cli import command, parser
from cloze.errors import ExitCode
from cloze.log import closing, log
from pretrain.runs.follow import follow
from pretrain.runs.listing import compared, find, listed, table
from pretrain.runs.server import serve

LOOPBACK, PORT = "127.0.0.1", 8765

PARSER = parser(
    "pretrain.runs", "The runs under a directory: their state, what differs, one live, or all in a browser."
)


def _root(arguments: ArgumentParser, default: Path | str = SUPPRESS) -> None:
    """Before the word or after it; what stands before it is not forgotten."""
    arguments.add_argument("--root", type=Path, default=default, help="directory that holds the runs")


_root(PARSER, Path("runs"))
_what = PARSER.add_subparsers(dest="what", metavar="{list,diff,follow,serve}", title="what to do [list]")
_list = _what.add_parser("list", help="a line for each run: state, step, losses, speed, time left")
_root(_list)
_list.add_argument("--json", action="store_true", help="print JSON for scripts")
_diff = _what.add_parser("diff", help="the keys in which runs differ, and how far they came")
_diff.add_argument("runs", nargs="+", metavar="RUN", help="names under --root, or directories")
_root(_diff)
_follow = _what.add_parser("follow", help="the lines of one run as they come, until it ends")
_follow.add_argument("run", metavar="RUN", help="name under --root, or directory")
_root(_follow)
_serve = _what.add_parser("serve", help="pages of all runs for a browser, live, read-only")
_serve.add_argument("--host", default=LOOPBACK, help="address to listen on; any but this machine's own needs --token")
_serve.add_argument("--port", type=int, default=PORT, help="0 takes a free one")
_serve.add_argument("--token", help="what a browser must know: it is asked for as ?token=… once")
_root(_serve)


@command(PARSER)
def main(options: Namespace) -> int:
    """Do what is asked; results go to stdout."""
    match options.what:
        case "diff":
            runs = [find(options.root, name) for name in options.runs]
            print("\n".join(compared(runs)))
            closing("compared; nothing is written", "python", "-m", "pretrain.report", *map(str, runs))
        case "follow":
            return follow(find(options.root, options.run))
        case "serve":
            return serve(options.root, options.host, options.port, options.token)
        case _:
            standings = listed(options.root)
            if getattr(options, "json", False):
                told = [asdict(one) | {"directory": str(one.directory)} for one in standings]
                print(json.dumps(told, indent=1, ensure_ascii=False))
                return ExitCode.OK
            print("\n".join(table(standings)))
            newest = max(standings, key=lambda one: one.seen)
            log.info(f"{len(standings)} runs in {options.root}; the newest: {newest.name}, {newest.line}")
            if newest.command:
                log.info(f"next: {newest.advice}:  {newest.command}")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
