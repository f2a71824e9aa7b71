"""Hydra entry points and what they share: planning a cell, checking it, running it, reporting it."""
