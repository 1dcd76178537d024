"""Entry: `python -m finetune task=classification model=out/books data.train=a.tsv data.dev=b.tsv out=out/task`."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cloze import cli
from cloze.errors import ExitCode, Stopped, UserError
from cloze.log import closing
from cloze.patience import telling
from finetune.config import FinetuneConfig


def finetune(config: FinetuneConfig) -> dict[str, float]:
    """Fine-tune as `config` says and write its `out`; returns the scores, averaged over the seeds."""
    try:  # here: transformers takes seconds, and --help none of them
        with telling("starting"):
            from finetune.train import run
        return run(config)
    except ModuleNotFoundError as error:
        raise UserError(f"task={config.task}: needs {error.name}: pip install 'cloze[finetune]'") from None


def _next(config: FinetuneConfig) -> tuple[str, ...]:
    """Label data.dev, as other files will be, where it is a file."""
    out, dev = Path(config.out), config.data.test or config.data.dev
    if dev is None or not Path(dev).is_file():
        return ("python", "-m", "finetune.grid", config.out)
    return ("python", "-m", "finetune.predict", config.out, dev, str(out.with_name(f"{out.name}-labels.jsonl")))


def _line(scores: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items())


def run(config: FinetuneConfig) -> int:
    """Fine-tune and tell the scores, and what they stand beside."""
    try:
        result = finetune(config)
    except KeyboardInterrupt:
        from finetune import resume

        raise Stopped(resume.standing(config.out)) from None
    if os.environ.get("RANK", "0") != "0":  # of several: one tells
        return ExitCode.OK
    body = json.loads((Path(config.out) / "metrics.json").read_text(encoding="utf-8"))
    print(_line(result))
    unknown = "  ".join(f"data.{name} {share:.1%}" for name, share in body["unk_share"].items())
    print(f"guessing: {_line(body['guessing'])}   [UNK]: {unknown}")
    if "distilled" in body:
        from finetune.side_by_side import lines

        print(*lines(body["distilled"], body["score"]), sep="\n")
    print(f"{config.out}: model, tokenizer, metrics.json, report.html and README.md")
    closing(f"{config.out}: finished; report.html shows what it gets wrong", *_next(config))
    return ExitCode.OK


def tell_sweep(configs: Sequence[FinetuneConfig]) -> None:
    """What a grid gave as a table; the pages of its models show all of it."""
    from finetune import page, resume, tried

    bodies = {Path(one.out): body for one in configs if (body := resume.metrics(Path(one.out)))}
    if len(bodies) > 1 and len({body["config"]["task"] for body in bodies.values()}) == 1:
        print(tried.markdown(bodies), end="")
        for folder in bodies:
            page.write_page(folder, folder)


main = cli.hydra_command("finetune", FinetuneConfig, after_sweep=tell_sweep)(run)

if __name__ == "__main__":
    sys.exit(main())
