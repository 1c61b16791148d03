"""Measurements of speed and memory against dense and against other 2:4 code: ``slope bench``."""
