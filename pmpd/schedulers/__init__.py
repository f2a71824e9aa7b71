"""What chooses the precision of decode steps: a fixed schedule, or a network that looks at the prompt's KV cache."""

from pmpd.schedulers.base import Planned, Policy, Scheduler
from pmpd.schedulers.fixed import Fixed
from pmpd.schedulers.labels import label
from pmpd.schedulers.learned import KVPooler, Learned, LearnedNetwork, load_network, save_network
from pmpd.schedulers.train import TrainReport, train

__all__ = [
    "Fixed",
    "KVPooler",
    "Learned",
    "LearnedNetwork",
    "Planned",
    "Policy",
    "Scheduler",
    "TrainReport",
    "label",
    "load_network",
    "save_network",
    "train",
]
