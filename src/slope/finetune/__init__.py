"""Fine-tuning of a pretrained BERT on GLUE and SQuAD v1.1, zeros kept.

``settings`` reads what is typed behind ``slope finetune``; ``check`` finds what is wrong with it;
``finetune`` does the runs, one per seed, and sums them up; ``results`` reads what they gave.
Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from slope.finetune.config import TASKS, Settings, settings
from slope.finetune.program import check, finetune, markdown, results

__all__ = ["TASKS", "Settings", "check", "finetune", "markdown", "results", "settings"]
