"""Training on one GPU beside Hugging Face's models: `PYTHONPATH=. python benchmarks/train_gpu.py --minutes 5`.

BERT-base, BERT-large and ModernBERT-base at 128, 512 and 1,024 tokens, bf16, AdamW; BERT with dropout 0.1 on hidden
states and attention, as published. Nine of ten samples are of full length, the others shorter, as BERT's
`short_seq_prob` makes them; 15% of tokens are masked. **Not measured on a GPU yet.** In this order, so that a run which
is cut off has what matters most, and after each figure the JSON is written anew:

- plain: ours, the engine under ZeRO 1 with packed rows, 32,768 and 65,536 tokens at a time; eager: Hugging Face's
  module, rows padded to full length, head on all positions, autocast, eager attention, torch's fused AdamW;
- compiled: ours with compiled layers, and so without dropout on attention; Hugging Face's with SDPA under
  torch.compile;
- stages: ZeRO 2 and 3, and a profile of one step, of BERT-large at 512.

Peers take as many samples at a time as our best, or as many as fit. MFU counts real tokens
(pretrain/telemetry/throughput.py says how). `--tiny` runs every path on a CPU in minutes; its figures mean nothing.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloze import cli
from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.masking import Masking, Unmasked, draw_masks
from cloze.corpus.shards import Samples, sample_ids
from pretrain import dist
from pretrain.config import LossConfig, TrainConfig, padded_vocab_size
from pretrain.data.loader import IGNORED, MicroBatch, bounded, pack
from pretrain.engine.engine import Engine
from pretrain.model.architectures import blueprint_of
from pretrain.model.attention import choose_kernel
from pretrain.model.bert import PackedBert
from pretrain.model.loss import pretraining_loss
from pretrain.telemetry.throughput import peak_flops, training_flops

WEIGHTS = LossConfig(mlm_weight=1.0, nsp_weight=1.0, z_loss_weight=0.0)
MODELS, TINY_MODELS = ("base", "large", "modernbert_base"), ("tiny", "modernbert_base")
LENGTHS, TINY_LENGTHS = (128, 512, 1024), (16,)
TOKENS, TINY_TOKENS = (32_768, 65_536), (32, 64)  # at a time
FIRST = (("base", 128), ("large", 512), ("modernbert_base", 1024))  # of the compiled ones
BARS = {"mfu": 0.45, "eager": 2.5, "compiled": 1.4, "modernbert_base tokens/s": 304_000}
ON_GPU = torch.cuda.is_available()
WARMUP_STEPS, SECONDS = (5, 2.5) if ON_GPU else (1, 0.0)


def facts_of(model: str) -> TokenizerFacts:
    """Of the vocabulary that the model was published with."""
    size = 50_368 if model.startswith("modernbert") else 30_522
    return TokenizerFacts(fingerprint="", vocab_size=size, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4)


def micro_batches(model: str, size: int, max_len: int) -> list[MicroBatch]:
    """Four different ones, on the host."""
    rng, facts, made = np.random.default_rng(size), facts_of(model), []
    masking = Masking(strategy="token", probability=0.15, max_predictions=max(80, max_len // 6), seed=1)
    for number in range(4):
        totals = np.where(rng.random(size) < 0.1, rng.integers(8, max_len, size), max_len)
        lengths = np.stack([totals // 2, totals], axis=1).astype(np.uint16)
        tokens = rng.integers(5, facts.vocab_size, totals.sum()).astype(np.uint16)
        ends = totals.cumsum()
        tokens[ends - totals], tokens[ends - 1], tokens[ends - totals + totals // 2 - 1] = 2, 3, 3
        ids = sample_ids(number, 0, size)
        masks = draw_masks(Unmasked(tokens, lengths, ids), 0, masking, facts.mask_vocabulary)
        batch = bounded(pack([(Samples(tokens, lengths, (ids % 2).astype(np.uint8), ids, None), masks)]))
        made.append(batch.pin_memory() if ON_GPU else batch)
    return made


def padded(batch: MicroBatch, max_len: int, *, pairs: bool) -> dict[str, Tensor]:
    """The same samples as a rectangle."""
    labels = torch.full_like(batch.input_ids_T, IGNORED)
    labels[batch.masked_index_M[: batch.num_masked]] = batch.mlm_labels_M[: batch.num_masked]
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()
    inside = torch.arange(max_len) < lengths[:, None]
    places = torch.where(inside, starts[:, None] + torch.arange(max_len), 0)
    rows = {
        "input_ids": batch.input_ids_T[places] * inside,
        "attention_mask": inside.long(),
        "labels": torch.where(inside, labels[places], IGNORED),
    }
    if pairs:
        rows["token_type_ids"] = batch.token_type_ids_T[places] * inside
        rows["next_sentence_label"] = batch.nsp_labels_N
    return rows


def timed(step: Callable[[int], None], batches: list[MicroBatch], config: TrainConfig) -> dict[str, Any]:
    """Rates, MFU and peak memory of `step(i)` over the batches in turns."""
    rows = padded_vocab_size(facts_of(config.model.name).vocab_size, config.model.pad_vocab_to)
    pairs = config.model.architecture.has_pairs
    flops = [
        training_flops(config.model, rows, b.num_tokens, b.tokens_squared, b.num_masked, pairs * len(b.nsp_labels_N))
        for b in batches
    ]
    wait = torch.cuda.synchronize if ON_GPU else lambda: None
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    numbers = cycle(range(len(batches)))
    try:
        for _ in range(WARMUP_STEPS):
            step(next(numbers))
        wait()
        start, done, tokens, work = time.perf_counter(), 0, 0, 0.0
        while not done or time.perf_counter() - start < SECONDS:
            number = next(numbers)
            step(number)
            done, tokens, work = done + 1, tokens + batches[number].num_tokens, work + flops[number]
        wait()
    except torch.OutOfMemoryError:
        return {"size": len(batches[0].nsp_labels_N), "failed": "out of memory"}
    seconds = time.perf_counter() - start
    peak = peak_flops(torch.cuda.get_device_name()) if ON_GPU else None
    return {
        "size": len(batches[0].nsp_labels_N),
        "sequences_per_second": done * len(batches[0].nsp_labels_N) / seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": work / seconds / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
    }


def config_of(model: str, max_len: int, size: int, zero: str, attention_dropout: float = 0.1) -> TrainConfig:
    overrides = [
        f"model={model}", "run=bench", "data.path=none", f"zero={zero}", "precision=bf16",
        f"global_batch_size={size}", f"micro_batch_size={size}",
    ]  # fmt: skip
    if model.startswith("modernbert"):
        overrides += ["model.num_layers=3"] if max_len in TINY_LENGTHS else []
    else:
        positions = max(512, max_len)
        overrides += ["model.dropout=0.1", f"model.attention_dropout={attention_dropout}"]
        overrides += [f"model.max_positions={positions}"]
    return cli.compose("train", TrainConfig, overrides)


def our_step(config: TrainConfig, max_len: int, *, compiled: bool) -> Callable[[MicroBatch], None]:
    """One optimizer step of one micro-batch through the engine."""
    process = dist.start()
    kernel = choose_kernel(config.model, config.precision, torch.cuda.get_device_capability() if ON_GPU else None)
    module = PackedBert(config.model, facts_of(config.model.name), max_len=max_len, kernel=kernel)
    if compiled:
        module.compile_layers(**({} if ON_GPU else {"backend": "aot_eager"}))
    engine = Engine(module, config, process)

    def step(host: MicroBatch) -> None:
        def loss_of(logits: tuple[Tensor, Tensor], batch: MicroBatch) -> Tensor:
            counts = {"masked": batch.num_masked, "pairs": module.has_pairs * len(batch.nsp_labels_N)}
            return pretraining_loss(logits, batch.mlm_labels_M, batch.nsp_labels_N, weights=WEIGHTS, **counts).loss

        engine.backward(host.to(process.device), loss_of)
        engine.step(1e-4)

    return step


def ours(
    model: str, max_len: int, size: int, zero: str, *, compiled: bool = False, attention_dropout: float = 0.1
) -> dict[str, Any]:
    config = config_of(model, max_len, size, zero, attention_dropout)
    step, batches = our_step(config, max_len, compiled=compiled), micro_batches(model, size, max_len)
    return timed(lambda number: step(batches[number]), batches, config)


def peer(model: str, max_len: int, size: int, *, compiled: bool) -> dict[str, Any]:
    """With as many samples at a time, or half as many, until they fit."""
    found = _peer(model, max_len, size, compiled=compiled)
    fresh()
    return peer(model, max_len, size // 2, compiled=compiled) if "failed" in found and size > 1 else found


def _peer(model: str, max_len: int, size: int, *, compiled: bool) -> dict[str, Any]:
    config, device = config_of(model, max_len, size, "1"), "cuda" if ON_GPU else "cpu"
    facts = facts_of(model)
    module = blueprint_of(config.model.architecture).build(config.model, facts, facts.vocab_size).to(device).train()
    module.set_attn_implementation("sdpa" if compiled else "eager")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    call = torch.compile(module, backend="inductor" if ON_GPU else "eager") if compiled else module
    batches = micro_batches(model, size, max_len)
    pairs = config.model.architecture.has_pairs
    rows = [padded(batch, max_len, pairs=pairs) for batch in batches]
    rows = [{key: value.pin_memory() if ON_GPU else value for key, value in row.items()} for row in rows]

    def step(number: int) -> None:
        inputs = {key: value.to(device, non_blocking=True) for key, value in rows[number].items()}
        with torch.autocast(device, torch.bfloat16):
            loss = call(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, batches, config)


def top_kernels(model: str, max_len: int, size: int) -> list[tuple[str, float]]:
    """(name, share of the device's time) of one step's ten longest."""
    step = our_step(config_of(model, max_len, size, "1"), max_len, compiled=False)
    batches = micro_batches(model, size, max_len)
    for batch in batches:
        step(batch)
    activities = [torch.profiler.ProfilerActivity.CPU] + ON_GPU * [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(batches[0])
    # An operator's kernels are its own.
    kind = torch.autograd.DeviceType.CUDA if ON_GPU else torch.autograd.DeviceType.CPU
    name = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    events = [event for event in profile.key_averages() if event.device_type == kind]
    times = sorted(((getattr(event, name), event.key) for event in events), reverse=True)
    total = sum(seconds for seconds, _ in times)
    return [(key[:80], seconds / total) for seconds, key in times[:10]]


def fresh() -> None:
    gc.collect()
    torch._dynamo.reset()
    if ON_GPU:
        torch.cuda.empty_cache()


def plain(model: str, max_len: int, sizes: Sequence[int]) -> Iterator[tuple[str, Any]]:
    rates = {}
    for size in sizes:
        case = ours(model, max_len, size, "1")
        rates[size] = rate(case)
        yield f"ours_{size}", case
        fresh()
    yield "eager", peer(model, max_len, max(rates, key=lambda size: rates[size]), compiled=False)


def compiled(model: str, max_len: int, sizes: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """`sizes` begin with the best of the plain ones."""
    size = sizes[0]
    yield "ours_compiled", ours(model, max_len, size, "1", compiled=True)
    fresh()
    yield "compiled", peer(model, max_len, size, compiled=True)
    if not model.startswith("modernbert"):  # which has none
        yield "ours_no_dropout", ours(model, max_len, size, "1", compiled=True, attention_dropout=0.0)


def stages(model: str, max_len: int, sizes: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """ZeRO 1 is among the plain ones."""
    for zero in ("2", "3"):
        yield f"zero_{zero}", ours(model, max_len, sizes[0], zero)
        fresh()
    yield "top_kernels", top_kernels(model, max_len, sizes[0])


TASKS = {"plain": plain, "compiled": compiled, "stages": stages}


def rate(case: dict[str, Any]) -> float:
    return float(case.get("tokens_per_second", 0.0))


def best_of_ours(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fastest of ours with dropout as published."""
    cases = [case for name, case in found.items() if name.startswith("ours_") and name != "ours_no_dropout"]
    return max(cases, key=rate, default={})


def cases(tiny: bool) -> Iterator[tuple[str, str, int]]:
    models, lengths = (TINY_MODELS, TINY_LENGTHS) if tiny else (MODELS, LENGTHS)
    shapes = [(model, length) for length in lengths for model in models]
    yield from (("plain", *shape) for shape in shapes)
    first = [shape for shape in FIRST if shape in shapes]
    yield from (("compiled", *shape) for shape in [*first, *(shape for shape in shapes if shape not in first)])
    yield "stages", *(shapes[0] if tiny else ("large", 512))


def show(model: str, max_len: int, name: str, found: Any) -> None:
    where = f"{model:16}{max_len:5}  {name:16}"
    if name == "top_kernels":
        print(where + "\n" + "\n".join(f"    {share:5.1%}  {kernel}" for kernel, share in found), flush=True)
    elif "failed" in found:
        print(f"{where} {found['size']:4} at a time  {found['failed']}", flush=True)
    else:
        rest = f"  MFU {found['mfu']:.1%}  {found['peak_gib']:.1f} GiB" if found["mfu"] else ""
        print(f"{where} {found['size']:4} at a time  {found['tokens_per_second']:11,.0f} tokens/s{rest}", flush=True)


def show_ratios(model: str, max_len: int, found: Mapping[str, Any]) -> None:
    for name in ("eager", "compiled"):
        if rate(found.get(name, {})):
            ratio = rate(best_of_ours(found)) / rate(found[name])
            print(f"{model:16}{max_len:5}  best is {ratio:.2f}x {name} (bar {BARS[name]})", flush=True)


def worker(task: str, model: str, max_len: int, sizes: Sequence[int]) -> None:
    """A process of its own for each task: what one leaves in the GPU's memory or the compiler's is not the next one's.

    A line of JSON on stdout for each figure.
    """
    process = dist.start()
    torch.manual_seed(process.rank)
    for name, found in TASKS[task](model, max_len, sizes):
        print(json.dumps([name, found]), flush=True)
    dist.finish()


def run_worker(words: Sequence[str], seconds: float) -> Iterator[tuple[str, Any]]:
    """What the worker finds, as it finds it. After so many seconds it is killed; so is one that fails, told so."""
    command = [sys.executable, __file__, "--worker", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    assert process.stdout
    for line in process.stdout:
        if line.startswith('["'):  # DeepSpeed's lines begin with [ and a date
            yield tuple(json.loads(line))
    timer.cancel()
    if process.wait():
        print(f"{' '.join(words)}: ended by {process.returncode}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="every path with a tiny model, on a CPU too")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so many")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_gpu.json")
    arguments = parser.parse_args()
    if arguments.worker:
        task, model, max_len, sizes = arguments.worker
        worker(task, model, int(max_len), [int(size) for size in sizes.split(",")])
        return
    if not (ON_GPU or arguments.tiny):
        parser.error("there is no GPU; --tiny tries every path on a CPU")
    end = time.monotonic() + 60 * arguments.minutes
    name = torch.cuda.get_device_name() if ON_GPU else "cpu"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "bars": BARS}
    for task, model, max_len in cases(arguments.tiny):
        left = end - time.monotonic()
        if left < 0:
            break
        found = result.setdefault(f"{model}-{max_len}", {})
        sizes = [tokens // max_len for tokens in (TINY_TOKENS if arguments.tiny else TOKENS)]
        sizes = [best_of_ours(found).get("size", sizes[0])] if task != "plain" else sizes
        words = [task, model, str(max_len), ",".join(map(str, sizes))]
        for case, value in run_worker(words, left):
            found[case] = value
            show(model, max_len, case, value)
            arguments.out.parent.mkdir(exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        show_ratios(model, max_len, found)


if __name__ == "__main__":
    main()
