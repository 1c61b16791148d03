from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its device and precision for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
