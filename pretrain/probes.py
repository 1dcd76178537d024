"""Entry: `python -m pretrain.probes model=out/books data=probes`: what each layer of a frozen encoder knows.

Prints a table for each task, over layers, beside random weights of the same architecture (docs/finetuning.md).
"""

import sys

from cloze import cli
from cloze.errors import ExitCode, UserError
from cloze.patience import telling
from pretrain.evaluate import results
from pretrain.evaluate.frozen_config import ProbesConfig


def run(config: ProbesConfig) -> int:
    """Learn the probes, print the tables and write `out`."""
    results.refuse_foreign(config.out, results.PROBES)
    try:  # here: transformers takes seconds, and --help none of them
        from pretrain.evaluate.probing import as_data, markdown, run_probes

        with telling(f"model={config.model}: probing"):
            found = run_probes(config)
    except ModuleNotFoundError as error:
        raise UserError(f"probes need {error.name}: pip install 'cloze[finetune]'") from None
    print(markdown(found), end="")
    results.write(config.out, {"format": results.PROBES, "model": config.model, "results": as_data(found)})
    return ExitCode.OK


main = cli.hydra_command("probes", ProbesConfig, positional=("model",))(run)

if __name__ == "__main__":
    sys.exit(main())
