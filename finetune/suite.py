"""Entry: `python -m finetune.suite model=out/books suite=glue data=glue out=out/glue`: is the model any good?

Each task of the suite is learned from the model and, for comparison, from random weights of the same architecture, over
the same seeds. The table goes to `out` as Markdown and JSON and into the model card.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import entry
from data_prep.errors import ExitCode, UserError
from finetune.__main__ import finetune
from finetune.config import FinetuneConfig, Init, SuiteConfig, facts
from finetune.tasks import SUITES, TASKS
from pretrain.card import replace_section, table


def main(config: SuiteConfig) -> int:
    out = Path(config.out)
    names = config.tasks or SUITES[config.suite]
    settings = {task: found for task in names if (found := _settings(config, task)) is not None}
    if not settings:
        raise UserError(
            f"data={config.data}: has no task of {config.suite}; {names[0]}/train.tsv, say, is needed there"
        )
    results: dict[str, dict[str, Any]] = {}
    for task, own in settings.items():
        for init in Init if config.baseline else (Init.pretrained,):
            where = out / f"{task}-{init.value}"
            wanted = replace(own, init=init, out=str(where))
            if not (where / "metrics.json").is_file():
                print(f"{task}, {init.value} weights", flush=True)
                finetune(wanted)
            body = json.loads((where / "metrics.json").read_text(encoding="utf-8"))
            if any(body.get(key) != value for key, value in facts(wanted).items()):
                raise UserError(f"{where}: was made with other settings; remove it, or name another out")
            results.setdefault(task, {})[init.value] = body
    text = markdown(results, [task for task in names if task not in settings])
    (out / "results.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    in_card = replace_section(Path(config.model), "evaluation", text)
    print(text)
    print(
        f"{out}: results.md and results.json" + (f"; the table is in {config.model}/README.md, too" if in_card else "")
    )
    return ExitCode.OK


def markdown(results: Mapping[str, Mapping[str, Any]], missing: Sequence[str]) -> str:
    """Mean and standard deviation over the seeds of each task's own score, in percent."""
    rows = []
    for task, by_init in results.items():
        score = TASKS[task].score
        cells = [f"{100 * body[score]:.1f} ± {100 * body['std'][score]:.1f}" for body in by_init.values()]
        if "random" in by_init:
            cells.append(f"{100 * (by_init['pretrained'][score] - by_init['random'][score]):+.1f}")
        rows.append([task, score, *cells])
    columns = ["task", "score, %", "this model", "random weights", "difference"]
    some = next(iter(results.values()))["pretrained"]
    note = (
        f"On the development sets; mean and standard deviation of {some['num_seeds']} seeds. {some['epochs']} epochs, "
        f"batch {some['batch_size']}, learning rate {some['lr']:g}, {some['max_len']} tokens."
    )
    left_out = f" No data: {', '.join(missing)}." if missing else ""
    return f"{table(columns[: len(rows[0])], rows)}\n{note}{left_out}\n"


def _settings(config: SuiteConfig, task: str) -> FinetuneConfig | None:
    """How to learn `task`; None where `data` lacks it."""
    train = dev = None
    if config.data is not None:
        folder = Path(config.data) / task
        train, dev = (next(map(str, sorted(folder.glob(f"{name}.*"))), None) for name in ("train", "dev"))
        if train is None or dev is None:
            return None
    base = entry.compose("finetune", FinetuneConfig, ["model=any", "out=any"])
    own = {key: getattr(config, key) for key in ("model", "num_seeds", "epochs", "batch_size", "max_len")}
    data, optim = replace(base.data, train=train, dev=dev), replace(base.optim, lr=config.lr)
    return replace(base, task=task, data=data, optim=optim, **own)


if __name__ == "__main__":
    entry.run("suite", SuiteConfig, main)
