"""What a run will need and how long its steps will take, before it starts and without a GPU.

Parameters are counted on a model without weights, bytes follow from them (`memory.py`), products of
linear layers take the rates that were measured (`rates.yaml`), and everything else is arithmetic
(`timing.py`). ``slope estimate`` prints it; docs/estimate.md says what is in it.
"""

from __future__ import annotations

from slope.estimate.report import Estimate, Side, estimate
from slope.estimate.request import Request, parse

__all__ = ["Estimate", "Request", "Side", "estimate", "parse"]
