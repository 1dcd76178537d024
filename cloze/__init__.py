"""The ground that every other room stands on: errors, speech, storage, command lines and the format of a corpus.

Imports nothing of the other packages, and never torch. A corpus is opened by `cloze.corpus.open_corpus`.
"""

from cloze.errors import ExitCode, UserError

__all__ = ["ExitCode", "UserError"]
