"""The model card: README.md of an exported model, and its curves. Says what is known, and where nothing is known, that.

A section stands between comments that bear its name, so that it can be replaced later without touching the others:
`python -m finetune.suite` writes its table into "evaluation".
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloze.corpus.manifest import Manifest, is_held_out, manifest_sha256, read_manifest, val_name
from cloze.errors import UserError
from pretrain.telemetry.report import RunData, read_run, run_facts, thinned

if TYPE_CHECKING:  # it brings torch, which the --help of a suite does without
    from pretrain.checkpoint import TrainingState

CARD, CURVES = "README.md", "curves.svg"

_HEAD = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [{tags}]
---

# {name}

An encoder pretrained by {objective} with Cloze.
"""
_LOADING = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model, tokenizer = AutoModelForMaskedLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```

`python -m finetune task=… model={name} …` fine-tunes it, and so does whatever takes Hugging Face's models.
"""
_OBJECTIVES = {
    "nsp": "masked language modelling and next-sentence prediction",
    "sop": "masked language modelling and sentence order prediction",
}
_LIMITS = """## Limits

It knows the language of its corpus, with that corpus's errors, prejudices and gaps: nothing in training removes them.
It takes at most {positions} tokens at once, and training showed it {shown}.
It fills gaps and is meant to be fine-tuned: no generator of text, no source of facts.
The licence depends on the corpus and is for whoever publishes the model to state.
"""


def write_card(folder: Path, name: str, run: Path, state: "TrainingState", config: Mapping[str, Any]) -> None:
    """Write README.md into `folder`, and curves.svg where `run` has metrics; `config` is what the run was made with."""
    try:
        data: RunData | None = read_run(run, name)
    except UserError:  # a checkpoint that was moved away from its run
        data = None
    manifest = _manifest(config, state)
    objective = _OBJECTIVES.get(manifest.objective if manifest else "", "masked language modelling")
    trained = {"steps": f"{state.step:,}", "samples": f"{state.samples:,}", "tokens": f"{state.tokens:,}"}
    recipe = {**(run_facts(data) if data else {}), **trained}
    recipe.pop("corpus", None)  # a path of somebody's machine
    parts = [_HEAD.format(name=name, objective=objective, tags=config["model"].get("architecture", "bert"))]
    parts.append(_section("loading", _LOADING.format(name=name)))
    parts.append("## Corpus\n\n" + (_corpus(manifest) if manifest else "It was not at hand when this was written.\n"))
    parts.append("## Recipe\n\n" + table(("", ""), [*recipe.items()]))
    if data and _draw(data, folder / CURVES):
        parts.append(f"![Loss of masked language modelling by step, in training and held out]({CURVES})\n")
    parts.append("## Evaluation\n\n" + _section("evaluation", "On no task so far; `python -m finetune.suite` does it."))
    shown = f"no more than {manifest.max_len}" if manifest else "perhaps fewer"
    parts.append(_LIMITS.format(positions=config["model"]["max_positions"], shown=shown))
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8")


def replace_section(folder: Path, name: str, body: str) -> bool:
    """Put `body` into a section of the card in `folder`; False where there is no such card or section."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(f"<!-- {re.escape(name)} -->.*?<!-- /{re.escape(name)} -->\n", text, flags=re.DOTALL)
    if found:
        card.write_text(text[: found.start()] + _section(name, body) + text[found.end() :], encoding="utf-8")
    return found is not None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def push(folder: Path, repository: str, *, private: bool, endpoint: str | None = None) -> str:
    """Upload `folder` to the hub as whoever is logged in; returns its address. Raises `UserError` where refused.

    The card then says how to load it from there.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(f"--push {repository}: nobody is logged in; run `hf auth login`, or set HF_TOKEN")
    hub = HfApi(endpoint=endpoint)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        replace_section(folder, "loading", _LOADING.format(name=repository))
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by Cloze")
    except Exception as error:  # besides the client's own, those of its HTTP library, which is not always the same
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--push {repository}: failed ({told}); the model is in {folder}: repeat the command"
        ) from error
    return f"{hub.endpoint}/{repository}"


def _manifest(config: Mapping[str, Any], state: "TrainingState") -> Manifest | None:
    """The corpus's manifest, where the corpus is at hand and is still what was trained on."""
    folder = Path(config["data"]["path"])
    try:
        return read_manifest(folder) if manifest_sha256(folder) == state.identity.data else None
    except (UserError, OSError):
        return None


def _corpus(manifest: Manifest) -> str:
    passes = [split for name, split in manifest.splits.items() if not is_held_out(name)]
    documents = manifest.documents
    rows = [("documents kept", f"{documents['kept']:,} of {documents['read']:,}")]
    rows += [(f"dropped: {reason}", f"{count:,}") for reason, count in documents["dropped"].items() if count]
    rows += [
        ("samples in a pass", f"{passes[0].samples:,} of up to {manifest.max_len} tokens"),
        ("passes", f"{len(passes)}"),
        ("tokens in a pass", f"{passes[0].tokens:,}"),
        ("vocabulary", f"{manifest.tokenizer.vocab_size:,} WordPieces"),
        ("masking", f"{manifest.masking.probability:.0%} of the tokens, by {manifest.masking.strategy}"),
    ]
    for split in manifest.held_out:
        rows.append(
            (", ".join(("held out", *filter(None, [val_name(split)]))), f"{manifest.splits[split].samples:,} samples")
        )
    return table(("", ""), rows)


def _section(name: str, body: str) -> str:
    return f"<!-- {name} -->\n{body.strip()}\n<!-- /{name} -->\n"


def _draw(run: RunData, path: Path) -> bool:
    """The MLM losses as a stand-alone SVG; False where there is nothing to draw."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3), layout="constrained")).add_subplot()
    for name, label, look in (("train/mlm_loss", "training", "-"), ("eval/mlm_loss", "held out", "--o")):
        steps, values = thinned(*run.series(name))
        if any(math.isfinite(value) for value in values):
            axes.plot(steps, values, look, label=label, markersize=3)
    if not axes.lines:
        return False
    axes.set(xlabel="step", ylabel="MLM loss, nats")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    return True
