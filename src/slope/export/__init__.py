"""Models on disk: :func:`save_pretrained` and :func:`load_pretrained`, and two foreign formats.

:func:`save_dense` writes what `transformers` loads, :func:`save_peft` what `peft` loads. Nothing
that is read is ever unpickled. docs/formats.md describes each format.
"""

from slope.export.dense import save_dense, save_peft
from slope.export.load import load_pretrained
from slope.export.save import save_pretrained

__all__ = ["load_pretrained", "save_dense", "save_peft", "save_pretrained"]
