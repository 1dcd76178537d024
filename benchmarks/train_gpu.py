"""Training on one GPU beside Hugging Face's models: `python benchmarks/train_gpu.py` (about 8 minutes on an H200).

BERT-base and -large at 128 and 512 tokens, bf16, AdamW, dropout 0.1 on hidden states and attention, as published. Nine
of ten samples are of full length, the others shorter, as BERT's `short_seq_prob` makes them; 15% of tokens are masked.

- ours: the engine under ZeRO 1 with packed rows over a sweep of micro-batches; then, at the best of them, with compiled
  layers, and so without dropout on attention;
- eager, compiled: `BertForPreTraining`, rows padded to full length, head on all positions, autocast, torch's fused
  AdamW; with eager attention, and with SDPA under torch.compile. As many samples at a time as our best.

MFU counts real tokens (pretrain/telemetry/throughput.py says how); a profile of one step and ZeRO 2 and 3 follow for
the last model. `--tiny` runs every path on a CPU in a minute; its figures mean nothing.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
from pretrain.config import LossConfig, TrainConfig
from pretrain.data.loader import IGNORED, MicroBatch, bounded, pack
from pretrain.engine.engine import Engine
from pretrain.model.attention import choose_kernel
from pretrain.model.bert import PackedBert, hugging_face_model
from pretrain.model.loss import pretraining_loss
from pretrain.telemetry.throughput import peak_flops, training_flops

FACTS = TokenizerFacts(fingerprint="", vocab_size=30_522, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4)
WEIGHTS = LossConfig(mlm_weight=1.0, nsp_weight=1.0)
SIZES = {128: (64, 128, 256), 512: (16, 32, 64)}  # samples at a time
TINY_SIZES = {16: (2, 4)}
BARS = {"mfu": 0.45, "eager": 2.5, "compiled": 1.4}
ON_GPU = torch.cuda.is_available()
WARMUP_STEPS, SECONDS = (5, 2.5) if ON_GPU else (1, 0.0)


def micro_batches(size: int, max_len: int) -> list[MicroBatch]:
    """Four different ones, on the host."""
    rng, made = np.random.default_rng(size), []
    masking = Masking(strategy="token", probability=0.15, max_predictions=80, seed=1)
    for number in range(4):
        totals = np.where(rng.random(size) < 0.1, rng.integers(8, max_len, size), max_len)
        lengths = np.stack([totals // 2, totals], axis=1).astype(np.uint16)
        tokens = rng.integers(5, FACTS.vocab_size, totals.sum()).astype(np.uint16)
        ends = totals.cumsum()
        tokens[ends - totals], tokens[ends - 1], tokens[ends - totals + totals // 2 - 1] = 2, 3, 3
        ids = sample_ids(number, 0, size)
        masks = draw_masks(Unmasked(tokens, lengths, ids), 0, masking, FACTS.mask_vocabulary)
        batch = bounded(pack([(Samples(tokens, lengths, (ids % 2).astype(np.uint8), ids, None), masks)]))
        made.append(batch.pin_memory() if ON_GPU else batch)
    return made


def padded(batch: MicroBatch, max_len: int) -> dict[str, Tensor]:
    """The same samples as a rectangle."""
    labels = torch.full_like(batch.input_ids_T, IGNORED)
    labels[batch.masked_index_M[: batch.num_masked]] = batch.mlm_labels_M[: batch.num_masked]
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()
    inside = torch.arange(max_len) < lengths[:, None]
    places = torch.where(inside, starts[:, None] + torch.arange(max_len), 0)
    return {
        "input_ids": batch.input_ids_T[places] * inside,
        "token_type_ids": batch.token_type_ids_T[places] * inside,
        "attention_mask": inside.long(),
        "labels": torch.where(inside, labels[places], IGNORED),
        "next_sentence_label": batch.nsp_labels_N,
    }


def timed(step: Callable[[int], None], batches: list[MicroBatch], config: TrainConfig) -> dict[str, Any]:
    """Sequences per second, MFU and peak memory of `step(i)` over the batches in turns."""
    rows = -(-FACTS.vocab_size // config.model.pad_vocab_to) * config.model.pad_vocab_to
    flops = [
        training_flops(config.model, rows, b.num_tokens, b.tokens_squared, b.num_masked, len(b.nsp_labels_N))
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
        start, done, work = time.perf_counter(), 0, 0.0
        while not done or time.perf_counter() - start < SECONDS:
            number = next(numbers)
            step(number)
            done, work = done + 1, work + flops[number]
        wait()
    except torch.OutOfMemoryError:
        return {"size": len(batches[0].nsp_labels_N), "failed": "out of memory"}
    seconds = time.perf_counter() - start
    peak = peak_flops(torch.cuda.get_device_name()) if ON_GPU else None
    return {
        "size": len(batches[0].nsp_labels_N),
        "sequences_per_second": done * len(batches[0].nsp_labels_N) / seconds,
        "mfu": work / seconds / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
    }


def config_of(model: str, size: int, zero: str, attention_dropout: float = 0.1) -> TrainConfig:
    overrides = [
        f"model={model}", "run=bench", "data.path=none", f"zero={zero}", "precision=bf16", "model.dropout=0.1",
        f"model.attention_dropout={attention_dropout}", f"global_batch_size={size}", f"micro_batch_size={size}",
    ]  # fmt: skip
    return cli.compose("train", TrainConfig, overrides)


def our_step(config: TrainConfig, max_len: int, *, compiled: bool) -> Callable[[MicroBatch], None]:
    """One optimizer step of one micro-batch through the engine."""
    process = dist.start()
    kernel = choose_kernel(config.model, config.precision, torch.cuda.get_device_capability() if ON_GPU else None)
    module = PackedBert(config.model, FACTS, max_len=max_len, kernel=kernel)
    if compiled:
        module.compile_layers(**({} if ON_GPU else {"backend": "aot_eager"}))
    engine = Engine(module, config, process)

    def step(host: MicroBatch) -> None:
        def loss_of(logits: tuple[Tensor, Tensor], batch: MicroBatch) -> Tensor:
            counts = {"masked": batch.num_masked, "pairs": len(batch.nsp_labels_N)}
            return pretraining_loss(logits, batch.mlm_labels_M, batch.nsp_labels_N, weights=WEIGHTS, **counts).loss

        engine.backward(host.to(process.device), loss_of)
        engine.step(1e-4)

    return step


def ours(
    model: str,
    max_len: int,
    sizes: tuple[int, ...],
    zero: str,
    *,
    compiled: bool = False,
    attention_dropout: float = 0.1,
) -> list[dict[str, Any]]:
    config = config_of(model, sizes[0], zero, attention_dropout)
    step, found = our_step(config, max_len, compiled=compiled), []
    for size in sizes:
        batches = micro_batches(size, max_len)
        found.append(timed(lambda number, batches=batches: step(batches[number]), batches, config))
    fresh()
    return found


def peer(model: str, max_len: int, size: int, *, compiled: bool) -> dict[str, Any]:
    config, device = config_of(model, size, "1"), "cuda" if ON_GPU else "cpu"
    module = hugging_face_model(config.model, FACTS, vocab_rows=FACTS.vocab_size).to(device).train()
    module.set_attn_implementation("sdpa" if compiled else "eager")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    call = torch.compile(module, backend="inductor" if ON_GPU else "eager") if compiled else module
    batches = micro_batches(size, max_len)
    rows = [padded(batch, max_len) for batch in batches]
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
    step, batches = our_step(config_of(model, size, "1"), max_len, compiled=False), micro_batches(size, max_len)
    for batch in batches:
        step(batch)
    activities = [torch.profiler.ProfilerActivity.CPU] + ON_GPU * [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(batches[0])
    kind = (
        torch.autograd.DeviceType.CUDA if ON_GPU else torch.autograd.DeviceType.CPU
    )  # an operator's kernels are its own
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


def shape(model: str, max_len: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Everything about one model and length."""

    def rate(case: dict[str, Any]) -> float:
        return case.get("sequences_per_second", 0.0)

    found: dict[str, Any] = {"ours": ours(model, max_len, sizes, "1")}
    best = max(found["ours"], key=rate)
    size = (best["size"],)
    found["ours_compiled"] = ours(model, max_len, size, "1", compiled=True)
    found["ours_no_dropout"] = ours(model, max_len, size, "1", compiled=True, attention_dropout=0.0)
    found["best"] = best = max(best, *found["ours_compiled"], key=rate)
    for name, compiled in (("eager", False), ("compiled", True)):
        size = best["size"]
        while "failed" in (case := peer(model, max_len, size, compiled=compiled)) and size > 1:
            fresh()
            size //= 2
        found[name] = case
        fresh()
    return found


def stages(model: str, max_len: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """ZeRO 2 and 3 (1 is in `shape`), and the profile."""
    found: dict[str, Any] = {}
    for zero in ("2", "3"):
        found[f"zero_{zero}"] = ours(model, max_len, sizes[-1:], zero)[0]
    found["top_kernels"] = top_kernels(model, max_len, sizes[-1])
    return found


def cases(tiny: bool) -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
    models, sizes = (("tiny",), TINY_SIZES) if tiny else (("base", "large"), SIZES)
    for model in models:
        for max_len in sizes:
            yield "shape", model, max_len, sizes[max_len]
    yield "stages", models[-1], max_len, sizes[max_len]


def show(model: str, max_len: int, found: dict[str, Any]) -> None:
    for name, case in found.items():
        for one in case if isinstance(case, list) and name != "top_kernels" else [case]:
            if name == "top_kernels":
                print("\n".join(f"    {share:5.1%}  {kernel}" for kernel, share in one))
            elif "failed" in one:
                print(f"{model:6}{max_len:4}  {name:14} {one['size']:4} at a time  {one['failed']}")
            else:
                rest = f"  MFU {one['mfu']:.1%}  {one['peak_gib']:.1f} GiB" if one["mfu"] else ""
                print(
                    f"{model:6}{max_len:4}  {name:14} {one['size']:4} at a time  "
                    f"{one['sequences_per_second']:9.1f} sequences/s{rest}"
                )
    for name in ("eager", "compiled"):
        if "sequences_per_second" in found.get(name, {}):
            ratio = found["best"]["sequences_per_second"] / found[name]["sequences_per_second"]
            print(f"{model:6}{max_len:4}  best is {ratio:.2f}x {name} (bar {BARS[name]})", flush=True)


def worker(task: str, model: str, max_len: int, sizes: tuple[int, ...], out: Path) -> None:
    process = dist.start()
    torch.manual_seed(process.rank)
    found = {"shape": shape, "stages": stages}[task](model, max_len, sizes)
    out.write_text(json.dumps(found))
    dist.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="every path with a tiny model, on a CPU too")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_gpu.json")
    arguments = parser.parse_args()
    if arguments.worker:
        task, model, max_len, sizes = arguments.worker
        worker(task, model, int(max_len), tuple(map(int, sizes.split(","))), arguments.out)
        return
    if not (ON_GPU or arguments.tiny):
        parser.error("there is no GPU; --tiny tries every path on a CPU")
    start = time.perf_counter()
    name = torch.cuda.get_device_name() if ON_GPU else "cpu"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "bars": BARS}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for task, model, max_len, sizes in cases(arguments.tiny):
        part = arguments.out.with_suffix(".part")
        part.parent.mkdir(exist_ok=True)
        words = [task, model, str(max_len), ",".join(map(str, sizes))]
        command = [sys.executable, __file__, "--out", str(part), "--worker", *words]
        subprocess.run(command, check=True, env=environment)
        result[f"{task}-{model}-{max_len}"] = found = json.loads(part.read_text())
        part.unlink()
        show(model, max_len, found)
    result["minutes"] = (time.perf_counter() - start) / 60
    if not arguments.tiny:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
