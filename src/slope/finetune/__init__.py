"""Fine-tuning of a pretrained BERT on GLUE and SQuAD v1.1, zeros kept.

``settings`` reads what is typed behind ``slope finetune``; ``finetune`` does the runs, one per
seed, and sums them up. Nothing heavy is imported before it is called.
"""

from __future__ import annotations

from slope.finetune.config import TASKS, Settings, settings
from slope.finetune.program import finetune, markdown

__all__ = ["TASKS", "Settings", "finetune", "markdown", "settings"]
