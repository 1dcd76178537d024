"""Checkpoints: their format, the writer, the mirror in an object store. `load_hugging_face` makes a model of one."""

from typing import TYPE_CHECKING

from cloze.lazy import exports
from pretrain.checkpoint.format import (
    KINDS,
    MOMENTS,
    WEIGHT,
    Fragment,
    LossScale,
    Retention,
    Snapshot,
    TrainingState,
    assemble,
    clear_unfinished,
    list_checkpoints,
    load,
    named_by,
    newest_verified,
    path_of,
    remove_after,
    retain,
    step_of,
    verify,
    write,
)
from pretrain.checkpoint.writer import Writer, WriterOptions

if TYPE_CHECKING:
    from pretrain.export.hugging_face import load_hugging_face

__all__ = [
    "KINDS",
    "MOMENTS",
    "WEIGHT",
    "Fragment",
    "LossScale",
    "Retention",
    "Snapshot",
    "TrainingState",
    "Writer",
    "WriterOptions",
    "assemble",
    "clear_unfinished",
    "list_checkpoints",
    "load",
    "load_hugging_face",
    "named_by",
    "newest_verified",
    "path_of",
    "remove_after",
    "retain",
    "step_of",
    "verify",
    "write",
]
__getattr__ = exports(__name__, {"load_hugging_face": "pretrain.export.hugging_face"})  # which stands on us
