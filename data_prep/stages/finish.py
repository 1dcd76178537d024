"""The end of a preparation: what the tasks left becomes a manifest, written last; then the unfinished work goes."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

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
from cloze.storage import put
from data_prep.plan import Plan, clear_up
from data_prep.sources.base import Source
from data_prep.stages.buckets import read_facts
from data_prep.stages.documents import source_of
from data_prep.stages.map import MAP
from data_prep.stages.reduce import REDUCE, masking_of


def document_statistics(plan: Plan) -> dict[str, Any]:
    """What the map tasks read and dropped. Raises `UserError` if too much is malformed, or nothing is left."""
    tallies = [read_facts(path) for path in MAP.results(plan)]
    sources = []
    for number, source in enumerate(plan.sources):
        mine = [tally for task, tally in enumerate(tallies) if source_of(plan, task) == number]
        sources.append(_source_statistics(source, mine))
    total = {key: sum(source[key] for source in sources) for key in ("read", "bytes")}
    dropped = sum((Counter(source["dropped"]) for source in sources), Counter[str]())
    repaired = sum((Counter(source["repaired"]) for source in sources), Counter[str]())
    kept = total["read"] - dropped.total()
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "there are none"
        raise UserError(f"source: no document is left to train on ({reasons}); name files that hold text")
    return {
        "read": total["read"],
        "kept": kept,
        "bytes": total["bytes"],
        "dropped": dict(dropped),
        "repaired": dict(repaired),
        "sources": sources,
    }


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
        "paths": list(source.paths),
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
        for reason in ("duplicate", "near_duplicate"):
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
        raise UserError(
            f"source: {documents['kept']} documents make no training sample; add text, or lower val_fraction"
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
            "kind": "+".join(source.kind for source in plan.sources),
            "paths": [path for source in plan.sources for path in source.paths],
            "files": len(plan.files),
            "bytes": sum(file.bytes for file in plan.files),
            "plan_sha256": plan.sha256(),
        },
        documents=documents,
        splits=splits,
        shards=tuple(_entry(shard["entry"]) for shard in shards),
    )
    for file in sorted((plan.out / "tokenizer").iterdir()) if plan.remote else ():
        put(file, f"{plan.remote}/tokenizer/{file.name}")
    write_manifest(plan.work, manifest)
    put(plan.work / NAME, f"{plan.home}/{NAME}")
    clear_up(plan)
    return manifest


def _split_statistics(shards: list[dict[str, Any]]) -> SplitStatistics:
    return SplitStatistics(
        samples=sum(shard["entry"]["samples"] for shard in shards),
        tokens=sum(shard["entry"]["tokens"] for shard in shards),
        random_next=sum(shard["random_next"] for shard in shards),
        length_histogram=tuple(map(sum, zip(*(shard["length_histogram"] for shard in shards), strict=True))),
    )


def _entry(table: dict[str, Any]) -> ShardEntry:
    return ShardEntry(**{**table, "blocks": BlockIndex(**table["blocks"])})
