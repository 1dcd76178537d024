"""What the card of a pretrained model tells: facts of its run, its corpus and its evaluations, as rows of tables.

Everything is read from files: metrics.jsonl and the results (`pretrain.grammar`, `pretrain.probes`) in the run's
directory, the corpus's manifest where the corpus is at hand. No path of anybody's machine comes along.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cloze.corpus import diagnosis
from cloze.corpus.manifest import VAL, Manifest, is_held_out, manifest_sha256, read_manifest, val_name
from cloze.errors import UserError
from cloze.files import json_object
from pretrain.evaluate.baseline import Baseline
from pretrain.evaluate.plateau import evaluations_of, judge
from pretrain.evaluate.results import AGREEMENT, FREQUENCIES, GAIN, GRAMMAR, OVERALL, PROBES, WITHIN_WORD
from pretrain.telemetry.report import RunData, read_run, run_facts, thinned

Rows = list[tuple[str, ...]]

_OBJECTIVES = {
    "nsp": "masked language modelling and next-sentence prediction",
    "sop": "masked language modelling and sentence order prediction",
}
# Scripts that one language alone is written in, or nearly. Of others (Latin, Cyrillic, …) letters do not tell.
_LANGUAGES = {
    "armenian": "hy", "bengali": "bn", "cjk": "zh", "georgian": "ka", "greek": "el", "gujarati": "gu", "hangul": "ko",
    "hebrew": "he", "hiragana": "ja", "kannada": "kn", "khmer": "km", "lao": "lo", "malayalam": "ml", "myanmar": "my",
    "sinhala": "si", "tamil": "ta", "telugu": "te", "thai": "th", "tibetan": "bo",
}  # fmt: skip
_LEAST_SHARE = 0.1  # of the letters, for a script to tell a language
_ROWS = 8  # of the table of a curve
_PLATEAU = "eval/frequencies_loss"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How far a model was trained, and on what: kept in the mark of its export."""

    step: int
    samples: int
    tokens: int
    corpus_sha256: str  # of the manifest
    averaged_steps: Sequence[int] = ()  # of the checkpoints whose mean the weights are; (): those of `step` alone

    @property
    def facts(self) -> dict[str, Any]:
        """For the mark: of weights that are no mean, as it always was."""
        return {name: value for name, value in asdict(self).items() if name != "averaged_steps" or value}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run does not know of its card."""

    name: str | None = None  # None: that of the folder
    languages: Sequence[str] = ()  # BCP 47; (): what the scripts of the corpus tell
    license: str | None = None  # as the hub spells it

    def __post_init__(self) -> None:
        for language in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual", language):
                raise UserError(f"--language {language}: no code of a language; en, de and zh-Hant are some")
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise UserError(f"--license {self.license}: not as the hub spells one, such as cc-by-sa-4.0")


class Facts(NamedTuple):
    run: RunData | None  # None: a checkpoint that was moved away from its run
    languages: tuple[str, ...]
    told: dict[str, Any]  # values of the template, by name


def gather(run: Path, trained: Trained, config: Mapping[str, Any], options: Options) -> Facts:
    """All that the card tells of a model of this run."""
    try:
        data = read_run(run, options.name or run.name)
        data = replace(data, metrics=[row for row in data.metrics if row["step"] <= trained.step])
    except UserError:
        data = None
    data = data if data and data.metrics else None
    manifest = _manifest(config, trained)
    languages = tuple(options.languages) or (_languages(manifest) if manifest else ())
    counts = {"steps": f"{trained.step:,}", "samples": f"{trained.samples:,}", "tokens": f"{trained.tokens:,}"}
    recipe = {**(run_facts(data) if data else {}), **counts}
    recipe.pop("corpus", None)  # a path of somebody's machine
    if trained.averaged_steps:
        recipe["weights"] = f"mean of the checkpoints of steps {', '.join(f'{n:,}' for n in trained.averaged_steps)}"
    results = [body for path in sorted(run.glob("*.json")) if "format" in (body := json_object(path))]
    told = {
        "objective": _OBJECTIVES.get(manifest.objective if manifest else "", "masked language modelling"),
        "corpus": _corpus(manifest, languages) if manifest else None,
        "recipe": [*recipe.items()],
        "curve": _curve(data) if data else [],
        "held_out": [*_held_out(data, manifest)] if data else [],
        "verdict": _verdict(data) if data else None,
        "grammar": [*_grammar(results, data)],
        "probes": [row for body in results if body["format"] == PROBES for row in _probes(body)],
        "positions": config["model"]["max_positions"],
        "shown": f"no more than {manifest.max_len}" if manifest else "perhaps fewer",
    }
    return Facts(data, languages, told)


def languages_in(card: str) -> tuple[str, ...]:
    """Those in the front matter of a card."""
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    body = yaml.safe_load(found[1]) if found else {}
    return tuple(body.get("language") or ()) if isinstance(body, dict) else ()


def draw(run: RunData, path: Path) -> bool:
    """The MLM losses as a stand-alone SVG; False where there is nothing to draw."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3), layout="constrained")).add_subplot()
    looks = (("train/mlm_loss", "training", "-"), ("eval/mlm_loss", "held out", "--o"), (_PLATEAU, "frequencies", ":"))
    for name, label, look in looks:
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


def _manifest(config: Mapping[str, Any], trained: Trained) -> Manifest | None:
    """The corpus's manifest, where the corpus is at hand and is still what was trained on."""
    path = config["data"]["path"]
    if path is None:  # a mixture, which the recipe tells of
        return None
    folder = Path(path)
    try:
        return read_manifest(folder) if manifest_sha256(folder) == trained.corpus_sha256 else None
    except (UserError, OSError):
        return None


def _languages(manifest: Manifest) -> tuple[str, ...]:
    shares = diagnosis.shares_of_scripts(diagnosis.stored(manifest))
    found = {_LANGUAGES[script] for script, share in shares.items() if script in _LANGUAGES and share >= _LEAST_SHARE}
    return tuple(sorted(found - {"zh"} if "ja" in found else found))  # Japanese has its ideographs from Chinese


def _corpus(manifest: Manifest, languages: Sequence[str]) -> dict[str, Rows]:
    passes = [split for name, split in manifest.splits.items() if not is_held_out(name)]
    documents = manifest.documents
    counts = [("language", ", ".join(languages) or "its letters do not tell")]
    counts += [("documents kept", f"{documents['kept']:,} of {documents['read']:,}")]
    counts += [(f"dropped: {reason}", f"{count:,}") for reason, count in documents["dropped"].items() if count]
    counts += [
        ("samples in a pass", f"{passes[0].samples:,} of up to {manifest.max_len} tokens"),
        ("passes", f"{len(passes)}"),
        ("tokens in a pass", f"{passes[0].tokens:,}"),
        ("vocabulary", f"{manifest.tokenizer.vocab_size:,} tokens"),
        ("masking", f"{manifest.masking.probability:.0%} of the tokens, by {manifest.masking.strategy}"),
    ]
    for split in manifest.held_out:
        name = ", ".join(("held out", *filter(None, [val_name(split)])))
        counts.append((name, f"{manifest.splits[split].samples:,} samples"))
    findings = [
        (finding.name, finding.meaning if finding.level is diagnosis.Level.note else f"**{finding.meaning}**")
        for finding in diagnosis.stored(manifest)
    ]
    return {"sources": [*_sources(manifest)], "counts": [*counts], "findings": [*findings]}


def _sources(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    """Kind and names, without the folders; how many documents."""
    every = manifest.documents.get("sources") or [{**manifest.source, **manifest.documents}]
    for source in every:
        names = ", ".join(dict.fromkeys(re.split(r"[/\\]", str(path))[-1] for path in source.get("paths", ())))
        split = source.get("split")
        told = f"{source.get('kind', 'unknown')}: {names}" if names else str(source.get("kind", "unknown"))
        told += f", held out as {val_name(split)}" if split and is_held_out(split) and split != VAL else ""
        yield told, f"{source['read']:,}", f"{source['kept']:,}", f"{sum(source['dropped'].values()):,}"


def _last(run: RunData, name: str) -> float | None:
    _, values = run.series(name)
    return values[-1] if values else None


def _curve(run: RunData) -> Rows:
    """Some steps with their losses: of the evaluations, else of the lines of metrics."""
    of_evaluations = [row for row in run.metrics if "eval/mlm_loss" in row]
    every = of_evaluations or [row for row in run.metrics if "train/mlm_loss" in row]
    places = sorted({round(number * (len(every) - 1) / (_ROWS - 1)) for number in range(_ROWS)}) if every else []
    found = []
    for row in (every[place] for place in places):
        losses = [row.get(name) for name in ("train/mlm_loss", "eval/mlm_loss")]
        tokens = f"{row['tokens']:,}" if isinstance(row.get("tokens"), int) else ""
        found.append((f"{row['step']:,}", tokens, *("" if loss is None else f"{loss:.3f}" for loss in losses)))
    return found


def _held_out(run: RunData, manifest: Manifest | None) -> Iterator[tuple[str, ...]]:
    """Each figure beside what frequencies alone, or the more frequent label, and a blind guess give."""
    size = manifest.tokenizer.vocab_size if manifest else None
    figures = (
        ("MLM loss", "eval/mlm_loss", ".3f", _PLATEAU, math.log(size) if size else None),
        ("MLM accuracy", "eval/mlm_accuracy", ".1%", None, 1 / size if size else None),
        ("NSP accuracy", "eval/nsp_accuracy", ".1%", "eval/majority_nsp_accuracy", 0.5),
    )
    for label, name, form, beside, blind in figures:
        for each in (name, *run.named(name)):
            value = _last(run, each)
            if value is not None:
                others = (_last(run, beside) if beside and each == name else None, blind)
                split = f", {each.split('/')[1]}" if each != name else ""
                yield f"{label}{split}", f"{value:{form}}", *("" if one is None else f"{one:{form}}" for one in others)


def _verdict(run: RunData) -> str | None:
    """Whether the model has left the plateau of word frequencies."""
    frequencies = _last(run, _PLATEAU)
    if frequencies is None:
        return None
    baseline = Baseline(mlm_loss=frequencies, mlm_accuracy=0.0, nsp_accuracy=0.0)
    found = judge(evaluations_of(run.metrics), baseline)
    return found.line.partition("; ")[0].partition(". ")[0] if found and found.state != "early" else None


def _grammar(results: Sequence[Mapping[str, Any]], run: RunData | None) -> Iterator[dict[str, Any]]:
    """Of each file of minimal pairs; without any, what the run's own evaluations gave last."""
    bodies = [body for body in results if body["format"] == GRAMMAR and "minimal_pairs" in body]
    for body in bodies:
        found = body["minimal_pairs"]
        rows = []
        for kind in ("groups", "fields"):
            for name, row in found.get(kind, {}).items():
                cells = [_estimate(row.get(key), key == GAIN) for key in (WITHIN_WORD, FREQUENCIES, GAIN)]
                rows.append((name, f"{row['pairs']:,}", *cells))
        yield {"name": ", ".join(Path(name).stem for name in body["data"]), "rows": rows}
    if not bodies and run and _last(run, "eval/grammar_accuracy") is not None:
        rows = []
        for label, place in ((OVERALL, "eval/grammar"), (AGREEMENT, "eval/grammar_agreement")):
            values = [_last(run, f"{place}_{column}") for column in ("accuracy", "frequencies_accuracy", "gain")]
            if values[0] is not None:
                rows.append((label, "", *("" if value is None else f"{100 * value:.1f}" for value in values)))
        yield {"name": "minimal pairs", "rows": rows}


def _estimate(found: Mapping[str, float] | None, signed: bool) -> str:
    if not found:
        return ""
    return f"{100 * found['value']:{'+' if signed else ''}.1f} ± {100 * found['standard_error']:.1f}"


def _probes(body: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for result in body["results"]:
        value, low, high = max((layer["model"] for layer in result["layers"]), key=lambda interval: interval[0])
        random = [sum(layer["random"]) / len(layer["random"]) for layer in result["layers"] if layer["random"]]
        beside = (f"{max(random):.1f}" if random else "", f"{result['trivial']:.1f}" if result["trivial"] else "")
        yield result["task"], result["metric"], f"{value:.1f} ({low:.1f} to {high:.1f})", *beside
