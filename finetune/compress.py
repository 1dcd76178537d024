"""`python -m finetune.compress out/sst2 out/sst2-onnx`: a fine-tuned model as ONNX, whole and in int8."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze import cli
from cloze.errors import ExitCode, UserError

PARSER = cli.parser("finetune.compress", "Fine-tuned model -> ONNX and int8, scored beside it on the development set.")
PARSER.add_argument("model", type=Path, help="directory that `python -m finetune` wrote")
PARSER.add_argument("out", type=Path, help="directory to write")
PARSER.add_argument("--train", metavar="FILE", help="data.train, if it is not where it was (it tells the labels)")
PARSER.add_argument("--dev", metavar="FILE", help="data.dev, if it is not where it was, or to score on another one")


@cli.command(PARSER)
def main(options: Namespace) -> int:
    try:  # here: they take seconds, and --help none of them
        from finetune.onnx_export import compress
    except ModuleNotFoundError as error:
        raise UserError(f"needs {error.name}: pip install 'cloze[finetune]'") from None
    changes = {name: path for name in ("train", "dev") if (path := getattr(options, name))}
    body = compress(options.model, options.out, changes)
    for name in ("pytorch", "onnx", "onnx_int8"):
        row = body[name]
        same = f"   same answer {row['same_answer']:6.1%}" if "same_answer" in row else ""
        print(
            f"{name:10} {body['score']} {row[body['score']]:.4f}{same}   largest difference {row['difference']:.1e}   "
            f"{row['examples_per_second']:9.1f} examples/s"
        )
    print(f"{options.out}: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in body["bytes"].items()))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
