"""Mirrors runs to Weights & Biases. The only package that imports wandb, and only when asked to."""

from pmpd.tracking.ledger import Identity, was_sent
from pmpd.tracking.linking import link
from pmpd.tracking.tracker import NullTracker, Tracker, in_tuning, open_tracker

__all__ = ["Identity", "NullTracker", "Tracker", "in_tuning", "link", "open_tracker", "was_sent"]
