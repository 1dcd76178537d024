"""The card of a fine-tuned model: README.md with task, data, scores and what they stand beside, and code that runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config import FinetuneConfig, defaults, facts, flat
from finetune.tables import legend, of_seeds, shown
from pretrain.export.card import CARD, table

_HEAD = """---
library_name: transformers
pipeline_tag: {tag}
tags: [{task}]
---

# {name}

{model} fine-tuned for the task `{task}` by Cloze.

```python
{code}```
"""
_LIMITS = """## Limits

Scores are of data like those it was trained on; what it does with other texts nobody has looked at. It reads {max_len}
tokens at most. The licence depends on the data and on the pretrained model, and is for whoever publishes it to state.
"""
_TOLD_ELSEWHERE = ("model", "out", "task", "data.train", "data.dev", "data.test", "data.mismatched")


def write_card(folder: Path, config: FinetuneConfig, body: Mapping[str, Any]) -> None:
    """Write README.md into `folder` from what its metrics.json holds. Raises OSError."""
    family, name = config.definition.family, Path(config.out).name
    texts = '"A text.", "Another one."' if body.get("pairs") else '"A text."'
    head = {"name": name, "model": Path(config.model).name, "task": config.task, "tag": family.tag}
    usage = family.pooled_usage if body.get("pooled_head") else family.usage
    parts = [_HEAD.format(**head, code=usage.format(name=name, texts=texts))]
    parts.append("## Scores\n\n" + scores_table(body))
    parts += [f"**Seed {seed}: the model {wrong}.**\n" for seed, wrong in body.get("verdicts", {}).items()]
    if "distilled" in body:
        parts.append("## Beside its teacher\n\n" + _distilled(body["distilled"], body["score"]))
    parts.append("## Data\n\n" + table(("", "", "[UNK]"), [*data_rows(config, body)]))
    if "labels" in body:
        parts.append(f"Labels: {', '.join(f'`{label}`' for label in body['labels'])}.\n")
    parts.append("## Training\n\n" + table(("key", ""), [*changed_settings(config)]))
    parts.append(_LIMITS.format(max_len=config.max_len))
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8")


def scores_table(body: Mapping[str, Any]) -> str:
    """Every score over the seeds, that of the written model, and that of guessing."""
    seeds, best = body["by_seed"], str(body["model_of_seed"])
    kept = {str(seed): scores for seed, scores in seeds.items()}[best]
    several = len(seeds) > 1
    columns = ["score", "this model", *(["seeds"] if several else []), "guessing"]
    rows = []
    for name, value in kept.items():
        every = [shown(name, of_seeds(body, name))] if several else []
        rows.append([name, shown(name, [value]), *every, shown(name, [body["guessing"][name]])])
    note = f"In percent (errors as they are). This model is that of seed {best}"
    chosen = f", the best by {body['score']} on the development set; seeds: {legend(len(seeds))}" if several else ""
    return f"{table(columns, rows)}\n{note}{chosen}. Guessing: the commonest answer for everything.\n"


def _distilled(both: Mapping[str, Mapping[str, Any]], score: str) -> str:
    rows = [
        [
            name,
            f"{own['parameters']:,}",
            f"{own['bytes'] / 1e6:.1f}",
            f"{own['examples_per_second']:.0f}",
            shown(score, [own[score]]),
            f"{own['same_answer']:.1%}" if "same_answer" in own else "",
        ]
        for name, own in both.items()
    ]
    return table(["model", "parameters", "MB", "examples/s", score, "same answer"], rows)


def data_rows(config: FinetuneConfig, body: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, source without the folders of somebody's machine, share of [UNK]."""
    for name, share in body["unk_share"].items():
        source = getattr(config.data, name)
        if source is None:
            named = name == "dev" and config.data.train is not None
            told = f"{config.data.dev_fraction:g} of the training data, by hash of the text" if named else "the task's"
        else:
            told = source if source.startswith("hub:") else Path(source).name
        count = body.get(f"{name}_examples")
        many = f", {count:,} examples" if count else ""
        yield name, f"{told}{many}", f"{share:.1%}"


def changed_settings(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    """The rate, and what was set otherwise than by default."""
    always = ("optim.lr", "batch_size", "epochs", "max_len", "seed", "num_seeds")
    before = dict(flat(defaults()))
    for key, value in flat(facts(config)):
        own = not key.startswith(("log.", "wandb.")) and key not in _TOLD_ELSEWHERE
        if key in always or (own and value != before[key]):
            yield f"`{key}`", Path(value).name if key == "distill.teacher" else str(value)
