"""`python -m finetune.compress out/sst2 out/sst2-onnx`: a fine-tuned or pretrained model as ONNX, whole and in int8."""

import sys
from argparse import Namespace
from pathlib import Path

from cloze import cli
from cloze.errors import ExitCode, UserError
from cloze.log import closing
from cloze.patience import telling

PARSER = cli.parser("finetune.compress", "Fine-tuned or pretrained model -> ONNX and int8, scored beside it.")
PARSER.add_argument("model", type=Path, help="directory that `python -m finetune` or pretrain.export wrote")
PARSER.add_argument("out", type=Path, help="directory to write")
PARSER.add_argument("--train", metavar="FILE", help="data.train, if it is not where it was (it tells the labels)")
PARSER.add_argument("--dev", metavar="FILE", help="data.dev, if it is not where it was; or a text to fill gaps in")
PARSER.add_argument("--max-loss", type=float, default=0.01, metavar="X", help="of the score, that int8 may lose")


@cli.command(PARSER)
def main(options: Namespace) -> int:
    try:  # here: they take seconds, and --help none of them
        from finetune.onnx_export import compress
        from finetune.side_by_side import lines
    except ModuleNotFoundError as error:
        raise UserError(f"needs {error.name}: pip install 'cloze[finetune]'") from None
    changes = {name: path for name in ("train", "dev") if (path := getattr(options, name))}
    with telling(f"{options.model}: compressing"):
        body = compress(options.model, options.out, changes, options.max_loss)
    print(*lines({name: body[name] for name in ("pytorch", "onnx", "onnx_int8")}, body["score"]), sep="\n")
    print(f"{options.out}: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in body["bytes"].items()))
    closing(f"{options.out}: saved; finetune.predict takes it as model=, an .onnx file in it, too")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
