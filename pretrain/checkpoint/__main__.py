"""`python -m pretrain.checkpoint runs/x` lists and verifies."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze.cli import command, parser
from cloze.errors import ExitCode, UserError
from cloze.log import closing
from pretrain.checkpoint.format import list_checkpoints, verify

PARSER = parser("pretrain.checkpoint", "List and verify checkpoints.")
PARSER.add_argument("run", type=Path, help="run directory, or its checkpoints directory")


@command(PARSER)
def main(options: Namespace) -> int:
    folder = options.run / "checkpoints" if (options.run / "checkpoints").is_dir() else options.run
    found = list_checkpoints(folder)
    if not found:
        raise UserError(f"{folder}: holds no checkpoints; name a run directory")
    damaged, sound = 0, None
    for path in found:
        faults = verify(path)
        size = sum(file.lstat().st_size for file in path.iterdir())
        print(f"{path.name}  {size / 1e6:10.1f} MB  {'; '.join(faults) or 'verified'}")
        damaged += bool(faults)
        sound = sound if faults else path
    if sound:
        run = sound.parents[1]
        closing("", "python", "-m", "pretrain.export", str(run), f"out/{run.resolve().name}")
    else:
        closing(f"{folder}: no checkpoint is sound; copy one back from elsewhere, or train anew with another run=…")
    return ExitCode.USAGE if damaged else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
