"""The model card: README.md of an exported model, and its curves. Says what is known, and where nothing is known, that.

The text is a template (templates/card.md); what it tells is gathered in `card_facts`. A section stands between comments
that bear its name, so that it can be replaced later without touching the others: `python -m finetune.suite` writes its
table into "evaluation".
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cloze.errors import UserError
from cloze.templates import render
from pretrain.export.card_facts import Options, Trained, draw, gather, languages_in

CARD, CURVES = "README.md", "curves.svg"

_LOADING = """```python
from transformers import pipeline

fill = pipeline("fill-mask", model="{name}")
for found in fill("{text}".replace("[MASK]", fill.tokenizer.mask_token)):
    print(f"{{found['score']:.1%}}  {{found['sequence']}}")
```

`python -m finetune task=… model={name} …` fine-tunes it, and so does whatever takes Hugging Face's models.
"""
_TEXTS = {  # to fill, by language
    "en": "She opened the door and went into the [MASK].",
    "de": "Sie öffnete die Tür und ging in das [MASK].",
    "es": "Abrió la puerta y entró en la [MASK].",
    "fr": "Elle ouvrit la porte et entra dans la [MASK].",
    "ja": "今日は[MASK]が良いです。",
    "ko": "오늘은 [MASK]가 좋습니다.",
    "ru": "Она открыла дверь и вошла в [MASK].",
    "zh": "今天天[MASK]很好。",
}
_NO_SCORES = "On no task so far; `python -m finetune.suite` does it."


def write_card(
    folder: Path, run: Path, trained: Trained, config: Mapping[str, Any], options: Options | None = None
) -> None:
    """Write README.md into the exported model's `folder`, and curves.svg where `run` has metrics.

    `config` is what the run was made with. A table that a suite has put into an earlier card stays. Raises `UserError`
    for languages and licences that are none, OSError.
    """
    options = options or Options()
    facts = gather(run, trained, config, options)
    name = options.name or folder.name
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "fill-mask"}
    front |= {"tags": [config["model"].get("architecture", "bert")]}
    if options.license:
        front = {"license": options.license, **front}
    if facts.languages:
        front = {"language": list(facts.languages), **front}
    text = render(
        __file__,
        "card.md",
        name=name,
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        loading=_loading(name, facts.languages),
        evaluation=_section_of(folder, "evaluation") or _NO_SCORES,
        license=options.license,
        curves=CURVES if facts.run and draw(facts.run, folder / CURVES) else None,
        section=_section,
        table=table,
        **facts.told,
    )
    (folder / CARD).write_text(re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n", encoding="utf-8")


def _loading(name: str, languages: Sequence[str]) -> str:
    text = next((_TEXTS[language] for language in languages if language in _TEXTS), _TEXTS["en"])
    return _LOADING.format(name=name, text=text)


def replace_section(folder: Path, name: str, body: str) -> bool:
    """Put `body` into a section of the card in `folder`; False where there is no such card or section."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = _found(text, name)
    if found:
        card.write_text(text[: found.start()] + _section(name, body) + text[found.end() :], encoding="utf-8")
    return found is not None


def _section_of(folder: Path, name: str) -> str | None:
    """What stands in a section of the card that is there."""
    card = folder / CARD
    found = _found(card.read_text(encoding="utf-8"), name) if card.is_file() else None
    return found[1] if found else None


def _found(text: str, name: str) -> "re.Match[str] | None":
    return re.search(f"<!-- {re.escape(name)} -->\n(.*?)\n<!-- /{re.escape(name)} -->\n", text, flags=re.DOTALL)


def _section(name: str, body: str) -> str:
    return f"<!-- {name} -->\n{body.strip()}\n<!-- /{name} -->\n"


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
        card = folder / CARD
        languages = languages_in(card.read_text(encoding="utf-8")) if card.is_file() else ()
        replace_section(folder, "loading", _loading(repository, languages))
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by Cloze")
    except Exception as error:  # besides the client's own, those of its HTTP library, which is not always the same
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--push {repository}: failed ({told}); the model is in {folder}: repeat the command"
        ) from error
    return f"{hub.endpoint}/{repository}"
