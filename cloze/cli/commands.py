"""What each command is for, and three examples: what `--help` begins with. The examples compose (a test tries them)."""

from typing import NamedTuple


class Command(NamedTuple):
    """One command as people start it."""

    start: str  # without arguments
    about: str  # what it does, in two lines at most
    examples: tuple[str, ...]  # arguments
    goes_on: bool = False  # the same command after an interruption: else it begins anew


def _module(name: str, about: str, *examples: str, goes_on: bool = False) -> Command:
    return Command(f"python -m {name}", about, examples, goes_on)


# By the name of the configuration, or of the module where a command takes arguments.
COMMANDS = {
    "prep": _module(
        "data_prep",
        "Turns raw text into a corpus: tokenizer, sentence pairs, masks, shards. The same command goes on.",
        "source=text 'source.paths=[books/*.txt]' out=shards/books",
        "source=jsonl 'source.paths=[pile.jsonl.zst]' source.field=text out=shards/pile max_len=512",
        "source=text 'source.paths=[books/*.txt]' out=shards/books preview=100",
        goes_on=True,
    ),
    "train": Command(
        "deepspeed pretrain/train.py",
        "Pretrains an encoder on a prepared corpus, on every device here. The same command goes on from the newest\n"
        "checkpoint. Also: python -m launch … (picks the processes), python -m pretrain.train … (one process).",
        (
            "data.path=shards/books run=books model=tiny steps=5_000",
            "data.path=shards/books run=books model=small recipe=fast precision=bf16",
            "data.path=shards/books 'run=sweep-${optim.lr}' optim.lr=1e-4,3e-4 --multirun",
        ),
        goes_on=True,
    ),
    "plan": _module(
        "pretrain.plan",
        "Tells what a run needs before it starts: memory, time, schedule. Takes training's keys; starts nothing.",
        "model=base gpu=h100 gpus=8 tokens=10B",
        "recipe=lamb_phase1 gpus=64 gpu=h100 micro_batch_size=64",
        "model=tiny gpu=cpu steps=5_000",
    ),
    "grammar": _module(
        "pretrain.grammar",
        "Scores a model on minimal pairs of grammar, beside what word frequencies alone give; no fine-tuning.",
        "model=runs/books 'data=[BLiMP.zip]'",
        "model=out/books 'data=[BLiMP.zip]' corpus=shards/books out=grammar.json",
        "model=out/books 'text=[held-out.txt]'",
    ),
    "probes": _module(
        "pretrain.probes",
        "Tells what each layer of a model knows, by linear probes on frozen states, against random weights.",
        "model=out/books 'data=[probes]'",
        "model=runs/books 'data=[probes]' samples=1_000",
        "model=out/books 'data=[probes]' random_seeds=0",
    ),
    "words": _module(
        "pretrain.words",
        "Tells what the word embeddings of a model know: nearest neighbours, and similarity where pairs are at hand.",
        "model=out/books",
        "model=out/books 'words=[king,river]' top=5",
        "model=out/books 'similarity=[simlex.tsv]'",
    ),
    "finetune": _module(
        "finetune",
        "Makes a model for a task of a pretrained one, with its scores beside the majority's.",
        "task=sst2 model=out/books out=out/sst2",
        "task=classification model=out/books data.train=train.tsv data.dev=dev.tsv out=out/reviews num_seeds=3",
        "task=ner model=out/books data.train=train.conll data.dev=dev.conll out=out/ner optim.lr=5e-5",
    ),
    "suite": _module(
        "finetune.suite",
        "Fine-tunes a model for all tasks of GLUE or CLUE, several seeds each, against random weights.",
        "model=out/books suite=glue out=out/glue",
        "model=out/books suite=glue 'tasks=[cola,sst2]' out=out/glue num_seeds=2",
        "model=out/books suite=clue out=out/clue baseline=false",
        goes_on=True,
    ),
    "predict": _module(
        "finetune.predict",
        "Labels a file of any size with a fine-tuned model; after a kill the same command goes on.",
        "out/sst2 texts.txt labels.tsv",
        "model=out/sst2 in=texts.jsonl out=labels.jsonl probabilities=true",
        "out/ner sentences.txt tags.conll",
        goes_on=True,
    ),
    "embeddings": _module(
        "finetune.embeddings",
        "Scores a model's vectors: similarity of sentences and retrieval, against random weights and BM25.",
        "model=out/embedder 'sts=[sts-dev.tsv]'",
        "model=out/embedder 'retrieval=[beir/nfcorpus]'",
        "model=out/books 'sts=[sts-dev.tsv]' random_seeds=0",
    ),
    "pretrain.report": _module(
        "pretrain.report",
        "One HTML page about a run, or about several side by side: where it stands, curves, what differs.",
        "runs/books",
        "runs/books runs/other",
        "runs/books runs/other --x tokens --out compared.html",
    ),
    "finetune.report": _module(
        "finetune.report",
        "One HTML page about a fine-tuned model: its scores beside others', what it takes for what, its worst errors.",
        "out/sst2",
        "out/sst2 --out sst2.html",
    ),
    "finetune.grid": _module(
        "finetune.grid",
        "Fine-tuned models as a table in Markdown: what varies, and the scores.",
        "out/grid",
        "out/a out/b",
    ),
    "finetune.compress": _module(
        "finetune.compress",
        "A fine-tuned or pretrained model as ONNX, whole and in int8, scored beside it.",
        "out/sst2 out/sst2-onnx",
    ),
    "finetune.probe": _module(
        "finetune.probe",
        "Fills gaps, or compares texts, without any fine-tuning.",
        "out/books 'The [MASK] sat on the mat.'",
        "out/books 'A cat sat.' 'A dog sat.' 'It rains.'",
    ),
    "pretrain.card": _module(
        "pretrain.card",
        "The card (README.md) of an exported model, anew from its run.",
        "runs/books out/books",
        "runs/books out/books --language en --license cc-by-sa-4.0",
    ),
    "pretrain.runs": _module(
        "pretrain.runs",
        "The runs under a directory: their state, what differs between two, one of them live, or all in a browser.",
        "",
        "diff runs/books runs/other",
        "serve --port 8000",
    ),
    "pretrain.export": _module(
        "pretrain.export",
        "Checkpoint -> a model in Hugging Face's format with a card; its logits are checked.",
        "runs/books out/books",
        "runs/books/checkpoints/step-00001000 out/books-1000",
        "runs/books out/books --force",
    ),
    "pretrain.checkpoint": _module(
        "pretrain.checkpoint", "Lists the checkpoints of a run and verifies them.", "runs/books", "runs/books --quiet"
    ),
    "data_prep.report": _module(
        "data_prep.report", "One HTML page about a corpus: its diagnosis, samples, lengths, drops.", "shards/books"
    ),
    "data_prep.verify": _module(
        "data_prep.verify", "Checks a finished corpus: every checksum, count and mask.", "shards/books"
    ),
    "data_prep.peek": _module(
        "data_prep.peek", "Prints samples of a corpus as people read them.", "shards/books", "shards/books --n 3"
    ),
}


def examples(command: Command) -> list[str]:
    """Lines that paste into a shell."""
    return [f"{command.start} {arguments}".rstrip() for arguments in command.examples]
