"""What a sweep of runs gave: a line for each, and one page over all that have trained."""

from collections.abc import Sequence
from pathlib import Path

from cloze.errors import UserError
from cloze.log import log
from pretrain.config import TrainConfig
from pretrain.runs.listing import table
from pretrain.telemetry.metrics_file import METRICS_NAME
from pretrain.telemetry.report import write_report
from pretrain.telemetry.standing import standing_of

PAGE_NAME = "sweep.html"  # in runs_root


def tell(configs: Sequence[TrainConfig]) -> None:
    """Print the table, write the page; one that cannot be written is a warning."""
    runs = [path for one in configs if (path := Path(one.runs_root) / one.run).is_dir()]
    if runs:
        print("\n".join(table([standing_of(run) for run in runs])), flush=True)
    trained = [run for run in runs if (run / METRICS_NAME).exists()]
    if len(trained) > 1:
        try:
            log.info(f"{write_report(trained, trained[0].parent / PAGE_NAME, axis='tokens')}: the runs side by side")
        except UserError as error:
            log.warning(str(error))
