"""A run as a Hugging Face model: written with its card, or loaded at once by `load_hugging_face`."""

from typing import TYPE_CHECKING

from cloze.lazy import exports

if TYPE_CHECKING:
    from pretrain.export.hugging_face import load_hugging_face

__all__ = ["load_hugging_face"]
__getattr__ = exports(__name__, {"load_hugging_face": "pretrain.export.hugging_face"})
