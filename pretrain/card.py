"""`python -m pretrain.card runs/books out/books --language en`: the card of an exported model, anew from its run.

With what has come since the export: results of `pretrain.grammar` and `pretrain.probes` that lie in the run's
directory, languages and a licence. What a suite has put into the card stays.
"""

import sys
from argparse import Namespace
from pathlib import Path

import yaml

from cloze import cli, ownership
from cloze.errors import DiskError, ExitCode, UserError
from cloze.log import closing
from pretrain.export.card import CARD, write_card
from pretrain.export.card_facts import Options, Trained
from pretrain.telemetry.metrics_file import METRICS_NAME
from pretrain.telemetry.report import read_metrics

PARSER = cli.parser("pretrain.card", "The card (README.md) of an exported model, from its run.")
PARSER.add_argument("run", type=Path, help="run directory that the model was exported from")
PARSER.add_argument("model", type=Path, help="directory made by `python -m pretrain.export`")
PARSER.add_argument("--language", nargs="+", metavar="CODE", default=(), help="such as en [what the scripts tell]")
PARSER.add_argument("--license", metavar="NAME", help="as the hub spells it, such as cc-by-sa-4.0")


@cli.command(PARSER)
def main(options: Namespace) -> int:
    """Write it; its path goes to stdout."""
    wanted = Options(languages=options.language, license=options.license)
    trained = _trained(options.model)
    if not ownership.is_of(options.run, ownership.RUN):
        raise UserError(f"{options.run}: no run; name the one that {options.model} was exported from")
    config = yaml.safe_load((options.run / "config.yaml").read_text(encoding="utf-8"))
    for row in read_metrics(options.run / METRICS_NAME):
        if row["step"] == trained.step and row.get("tokens", trained.tokens) != trained.tokens:
            raise UserError(
                f"{options.run}: had {row['tokens']:,} tokens at step {trained.step}, {options.model} has "
                f"{trained.tokens:,}; name the run that it was exported from"
            )
    try:
        write_card(options.model, options.run, trained, config, wanted)
    except OSError as error:
        raise DiskError(f"{options.model}: {error.strerror}; free space and run the same command again") from error
    print(options.model / CARD)
    closing(f"{options.model / CARD}: written; read it before you publish the model")
    return ExitCode.OK


def _trained(model: Path) -> Trained:
    told = ownership.marked(model, ownership.EXPORT) or {}
    try:
        return Trained(**{name: told[name] for name in Trained.__dataclass_fields__ if name in told})
    except TypeError:
        raise UserError(
            f"{model}: does not say of which step it is; write it by `python -m pretrain.export`, again if it is of an "
            "earlier version"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
