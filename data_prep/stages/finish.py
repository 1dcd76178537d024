"""The end of a preparation: what the tasks left becomes a manifest, written last; then the unfinished work goes."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cloze.corpus import diagnosis
from cloze.corpus.diagnosis import Finding
from cloze.corpus.manifest import (
    NAME,
    BlockIndex,
    Manifest,
    ShardEntry,
    SplitStatistics,
    TokenizerFacts,
    pass_name,
    write_manifest,
)
from cloze.errors import UserError
from cloze.redact import redact_text
from cloze.storage import put
from data_prep.config import Objective
from data_prep.plan import Plan, clear_up
from data_prep.sources.base import Source
from data_prep.stages.buckets import read_facts
from data_prep.stages.documents import source_of
from data_prep.stages.map import MAP
from data_prep.stages.reduce import REDUCE, masking_of
from data_prep.stages.survey import merged, unpacked
from data_prep.stages.tokenizer import tokenizer_directory, tokenizer_in


def document_statistics(plan: Plan) -> dict[str, Any]:
    """What the map tasks read and dropped. Raises `UserError` if too much is malformed, or nothing is left."""
    tallies = [read_facts(path) for path in MAP.results(plan)]
    sources = []
    for number, source in enumerate(plan.sources):
        mine = [tally for task, tally in enumerate(tallies) if source_of(plan, task) == number]
        split = plan.val_split_of(number)
        sources.append(_source_statistics(source, mine) | ({"split": split} if split else {}))
    training, held_out = sources[: len(plan.training_sources)], sources[len(plan.training_sources) :]
    if empty := next((table for table in held_out if not table["kept"]), None):
        raise UserError(
            f"val_sources: no document of {empty['split']} is left ({_reasons(empty)}); name files that hold text"
        )
    if not any(table["kept"] for table in training):
        raise UserError(f"source: no document is left to train on ({_reasons(*training)}); name files that hold text")
    total = {key: sum(source[key] for source in sources) for key in ("read", "bytes")}
    dropped = sum((Counter(source["dropped"]) for source in sources), Counter[str]())
    repaired = sum((Counter(source["repaired"]) for source in sources), Counter[str]())
    return {
        "read": total["read"],
        "kept": total["read"] - dropped.total(),
        "bytes": total["bytes"],
        "dropped": dict(dropped),
        "repaired": dict(repaired),
        "sources": sources,
    }


def _reasons(*tables: Mapping[str, Any]) -> str:
    """Why documents of sources were dropped, in words."""
    dropped = sum((Counter(table["dropped"]) for table in tables), Counter[str]())
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "there are none"


def _source_statistics(source: Source, tallies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was read of one source. Raises `UserError` if too much of it is malformed."""
    read, size, bad = (sum(tally[key] for tally in tallies) for key in ("read", "bytes", "bad"))
    if bad > source.max_bad_fraction * read:
        first = next(tally["first_bad"] for tally in tallies if tally["first_bad"])
        raise UserError(
            f"source: {bad} of {read} items are malformed (first: {first}), more than "
            f"source.max_bad_fraction={source.max_bad_fraction}; mend the input or raise the limit"
        )
    dropped = sum((Counter(tally["dropped"]) for tally in tallies), Counter[str]())
    return {
        "kind": source.kind,
        "paths": [redact_text(path) for path in source.paths],
        "weight": source.weight,
        "read": read,
        "kept": read - dropped.total(),
        "bytes": size,
        "dropped": dict(dropped),
        "repaired": dict(sum((Counter(tally["repaired"]) for tally in tallies), Counter[str]())),
    }


def finish(plan: Plan, facts: TokenizerFacts) -> Manifest:
    """Merge what the tasks left, write manifest.json last, clear up. Raises `UserError` if there are no samples."""
    config = plan.config
    documents = document_statistics(plan)
    results = [json.loads(path.read_text()) for path in REDUCE.results(plan)]
    for number, source in enumerate(documents["sources"]):
        source["tokens"] = sum(result["tokens"][number] for result in results)
        for reason in ("duplicate", "in_validation", "near_duplicate", "one_sentence"):
            count = sum(result[reason][number] for result in results)
            for table in (source, documents) if count else ():
                table["kept"] -= count
                table["dropped"][reason] = table["dropped"].get(reason, 0) + count
    shards = sorted((shard for result in results for shard in result["shards"]), key=lambda shard: shard["entry"]["id"])
    splits = {
        split: _split_statistics([shard for shard in shards if shard["entry"]["split"] == split])
        for split in sorted({shard["entry"]["split"] for shard in shards})
    }
    if pass_name(0) not in splits:
        training = documents["sources"][: len(plan.training_sources)]
        kept, reasons = sum(table["kept"] for table in training), _reasons(*training)
        raise UserError(
            f"source: {kept} documents make no training sample (dropped: {reasons}); add text, or lower val_fraction"
        )
    for source in documents["sources"][len(plan.training_sources) :]:
        if source["split"] not in splits:
            raise UserError(
                f"val_sources: {source['kept']} documents make no sample of {source['split']} (dropped: "
                f"{_reasons(source)}); add text"
            )
    manifest = Manifest(
        tokenizer=facts,
        max_len=config.max_len,
        objective=config.objective,
        masking=masking_of(plan),
        baked_draws=config.masking.baked_draws,
        seed=config.seed,
        passes=config.passes,
        source={
            "kind": "+".join(source.kind for source in plan.training_sources),
            "paths": [redact_text(path) for source in plan.training_sources for path in source.paths],
            "files": len(plan.training_files),
            "bytes": sum(file.bytes for file in plan.training_files),
            "plan_sha256": plan.sha256(),
        },
        documents=documents,
        splits=splits,
        shards=tuple(_entry(shard["entry"]) for shard in shards),
    )
    findings = (*text_findings(plan), *diagnosis.from_manifest(manifest), *_findings(plan, manifest, results))
    manifest = replace(manifest, diagnosis=diagnosis.as_data(findings))
    refuse_unfit(plan, findings)
    for file in sorted((plan.out / "tokenizer").iterdir()) if plan.remote else ():
        put(file, f"{plan.remote}/tokenizer/{file.name}")
    write_manifest(plan.work, manifest)
    put(plan.work / NAME, f"{plan.home}/{NAME}")
    clear_up(plan)
    return manifest


def text_findings(plan: Plan) -> tuple[Finding, ...]:
    """What the map tasks saw of the text of training sources."""
    counts = merged([read_facts(path)["survey"] for path in MAP.results(plan)[: plan.num_training_tasks]])
    return diagnosis.from_text(
        counts, tokenizer_in(tokenizer_directory(plan)).spelling, len(plan.training_files), plan.config.objective
    )


def _findings(plan: Plan, manifest: Manifest, results: Sequence[Mapping[str, Any]]) -> tuple[Finding, ...]:
    """What the reduce tasks saw."""
    training, held_out = results[: plan.num_buckets], results[plan.num_buckets :]
    used = np.zeros(-(-manifest.tokenizer.vocab_size // 8), np.uint8)
    for result in training:
        used |= np.frombuffer(bytes.fromhex(result["vocabulary"]), np.uint8)
    findings = [diagnosis.unused_vocabulary(int(np.unpackbits(used).sum()), manifest.tokenizer.vocab_size)]
    pairs_Nx3 = unpacked((shard for result in training for shard in result["shards"]), "pairs").astype(np.int64)
    if manifest.objective == Objective.nsp and len(pairs_Nx3):
        pairs_Nx3 = pairs_Nx3.reshape(-1, 3)
        findings += diagnosis.pairs_guessed(pairs_Nx3[:, :2], pairs_Nx3[:, 2].astype(np.uint8))
    findings += diagnosis.from_fingerprints(
        Counter(unpacked(training, "lines").tolist()),
        [(a, b, c) for a, b, c in unpacked(training, "sketches").reshape(-1, 3).tolist()],
        {*unpacked(training, "runs").tolist()},
        {*unpacked(held_out, "runs").tolist()},
    )
    return tuple(findings)


def refuse_unfit(plan: Plan, findings: Sequence[Finding]) -> None:
    """Raise `UserError` if no corpus should be made with these findings."""
    rules = plan.config.diagnosis
    unfit = diagnosis.refused(findings, rules.refuse, rules.ignore)
    if unfit:
        raise UserError(f"{unfit.line}; or set diagnosis.ignore=[{unfit.name}]")


def _split_statistics(shards: list[dict[str, Any]]) -> SplitStatistics:
    return SplitStatistics(
        samples=sum(shard["entry"]["samples"] for shard in shards),
        tokens=sum(shard["entry"]["tokens"] for shard in shards),
        random_next=sum(shard["random_next"] for shard in shards),
        length_histogram=tuple(map(sum, zip(*(shard["length_histogram"] for shard in shards), strict=True))),
    )


def _entry(table: dict[str, Any]) -> ShardEntry:
    return ShardEntry(**{**table, "blocks": BlockIndex(**table["blocks"])})
