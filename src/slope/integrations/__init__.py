"""Thin shells that let other people's trainers follow :class:`slope.SlopeSchedule`."""
