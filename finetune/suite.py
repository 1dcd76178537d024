"""Entry: `python -m finetune.suite model=out/books suite=glue data=glue out=out/glue`: is the model any good?

Each task of the suite is learned from the model and, for comparison, from random weights of the same architecture, over
the same seeds. The table goes to `out` as Markdown and JSON and into the model card.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cloze import cli
from cloze.errors import ExitCode, UserError
from cloze.files import write_whole
from cloze.log import closing
from cloze.ownership import require_own_file
from finetune import page, resume
from finetune.__main__ import finetune
from finetune.config import FinetuneConfig, SuiteConfig
from finetune.families import SUITES, TASKS
from finetune.keys import Init
from finetune.tables import legend, of_seeds, shown
from pretrain.export.card import replace_section, table

_FIRST_LINE = "| task | score, % | this model |"  # of results.md: known by it


def run(config: SuiteConfig) -> int:
    """Learn the tasks of the suite and write the table."""
    out = Path(config.out)
    names = config.tasks or SUITES[config.suite]
    settings = {task: found for task in names if (found := _settings(config, task)) is not None}
    if not settings:
        raise UserError(
            f"data={config.data}: has no task of {config.suite}; {names[0]}/train.tsv, say, is needed there"
        )
    require_own_file(out / "results.md", (_FIRST_LINE,))
    require_own_file(out / "results.json", ('"pretrained": {',))
    results: dict[str, dict[str, Any]] = {}
    for task, own in settings.items():
        for init in Init if config.baseline else (Init.pretrained,):
            wanted = replace(own, init=init, out=str(out / f"{task}-{init.value}"))
            results.setdefault(task, {})[init.value] = _result(task, wanted)
        pretrained = out / f"{task}-{Init.pretrained.value}"
        page.write_page(pretrained, pretrained)  # random weights are beside it now
    text = markdown(results, [task for task in names if task not in settings])
    write_whole(out / "results.md", text.encode())
    write_whole(out / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    in_card = replace_section(Path(config.model), "evaluation", text)
    print(text)
    print(
        f"{out}: results.md and results.json" + (f"; the table is in {config.model}/README.md, too" if in_card else "")
    )
    closing(f"{out}: finished; the model and the page (report.html) of each task lie in its folders")
    return ExitCode.OK


def _result(task: str, wanted: FinetuneConfig) -> dict[str, Any]:
    """The metrics.json of a task, learned now unless it is there. Raises `UserError` for one of other settings."""
    if (there := resume.finished(wanted)) is not None:
        return there
    print(f"{task}, {wanted.init.value} weights", flush=True)
    finetune(wanted)
    body = resume.metrics(Path(wanted.out))
    assert body is not None, "it was just written"
    return body


def markdown(results: Mapping[str, Mapping[str, Any]], missing: Sequence[str]) -> str:
    """Each task's own score over the seeds, in percent, beside guessing's and the share of [UNK]; and their average."""
    rows, by_task = [], []
    several = all(len(by_init) > 1 for by_init in results.values())
    for task, by_init in results.items():
        halves, own = [], by_init["pretrained"]
        for part, score in (("dev", TASKS[task].score), ("mismatched", "mismatched_accuracy")):
            if score in own:
                halves.append([of_seeds(body, score) for body in by_init.values()])
                beside = [shown(score, [own["guessing"][score]]), f"{own['unk_share'][part]:.1%}"]
                name = task if part == "dev" else f"{task}, {part}"
                rows.append([name, score, *_cells(halves[-1]), *beside])
        by_task.append(np.mean(halves, axis=0))
    rows.append(["average", "", *_cells(np.mean(by_task, axis=0).tolist()), "", ""])
    compared = ["random weights", "difference"] if several else []
    columns = ["task", "score, %", "this model", *compared, "guessing", "[UNK]"]
    own = {task: by_init["pretrained"]["config"] for task, by_init in results.items()}
    epochs, some = ", ".join(f"{task} {one['epochs']}" for task, one in own.items()), next(iter(own.values()))
    note = (
        f"On the development sets; {legend(some['num_seeds'])}; guessing: the commonest answer for everything. Batch "
        f"{some['batch_size']}, learning rate {some['optim']['lr']:g}, {some['max_len']} tokens; epochs: "
        f"{epochs}. In the average the halves of MNLI are one task."
    )
    left_out = f" No data: {', '.join(missing)}." if missing else ""
    return f"{table(columns, rows)}\n{note}{left_out}\n"


def _cells(by_init: Sequence[Sequence[float]]) -> list[str]:
    """Of the seeds' scores with pretrained, and perhaps with random, weights."""
    medians = [100 * statistics.median(scores) for scores in by_init]
    return [*(shown("", scores) for scores in by_init), *(f"{medians[0] - other:+.1f}" for other in medians[1:])]


def _settings(config: SuiteConfig, task: str) -> FinetuneConfig | None:
    """How to learn `task`; None where `data` lacks it."""
    base = cli.compose("finetune", FinetuneConfig, ["model=any", "out=any"])
    own = {key: getattr(config, key) for key in ("model", "num_seeds", "batch_size", "max_len")}
    data, epochs = base.data, config.epochs or TASKS[task].epochs
    if config.data is not None:
        folder = _folder(Path(config.data), task)
        train, dev = _file(folder, "train"), _file(folder, "dev") or _file(folder, "dev_matched")
        if train is None or dev is None:
            return None
        data = replace(data, train=train, dev=dev, mismatched=_file(folder, "dev_mismatched"))
    return replace(base, task=task, data=data, epochs=epochs, optim=replace(base.optim, lr=config.lr), **own)


def _folder(data: Path, task: str) -> Path:
    """That of the task: `sst2`, or `SST-2` as GLUE names it."""
    named = (path for path in sorted(data.glob("*")) if path.name.lower().replace("-", "") == task)
    return next(named, data / task)


def _file(folder: Path, stem: str) -> str | None:
    found = sorted(map(str, folder.glob(f"{stem}.*")))
    if len(found) > 1:
        raise UserError(f"data: which is {stem}? {', '.join(found)}; leave one of them there")
    return next(iter(found), None)


main = cli.hydra_command("suite", SuiteConfig)(run)

if __name__ == "__main__":
    sys.exit(main())
