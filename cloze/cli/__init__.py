"""The one room that knows Hydra: command line -> composed YAML -> frozen dataclass -> `main` -> exit code.

Every command of Cloze is a `main(arguments: list[str] | None = None) -> int` that can be called from anywhere, a
notebook say: it neither exits the interpreter nor reads `sys.argv` where arguments are given. `hydra_command` makes one
of a function of a configuration, `overrides_command` of one that composes for itself, `command` of one that takes
arguments instead of keys.

`entry` runs commands, `overrides` reads what was typed, `composition` makes the dataclass, `schemas` walks over what it
declares, `explanation` turns an error into one line with the name that was meant, which `synonyms` knows of other
tools' words, `help` tells the keys, `terminal` outlives the reader.
"""

from cloze.cli.composition import compose, typed
from cloze.cli.entry import command, guarded, hydra_command, overrides_command, parser, refuse_options
from cloze.cli.explanation import nearest
from cloze.cli.help import Key, help_text, keys
from cloze.cli.schemas import groups

__all__ = [
    "Key",
    "command",
    "compose",
    "groups",
    "guarded",
    "help_text",
    "hydra_command",
    "keys",
    "nearest",
    "overrides_command",
    "parser",
    "refuse_options",
    "typed",
]
