"""Compressed safetensors on disk: :func:`save_pretrained` and :func:`load_pretrained`.

A folder holds `model.safetensors`, `slope.json` (what is sparse, and how) and, for a model of
transformers, `config.json`. Nothing in it is ever unpickled. docs/design.md describes the format.
"""

from slope.export.load import load_pretrained
from slope.export.save import save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
