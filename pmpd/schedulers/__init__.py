"""What chooses the precision of decode steps: fixed, drawn, from a network, or step by step from what is decoded."""

from pmpd.schedulers import policies
from pmpd.schedulers.base import Blind, Planned, Policy, ReadsActivations, Scheduler
from pmpd.schedulers.build import Setting, build, check_options, policy_file, policy_names, trained_for
from pmpd.schedulers.fixed import Fixed
from pmpd.schedulers.labels import label
from pmpd.schedulers.learned import Learned
from pmpd.schedulers.network import ACTIVATIONS, KVPooler, LearnedNetwork, load_network, save_network
from pmpd.schedulers.random import Random
from pmpd.schedulers.train import Features, TrainReport, train

__all__ = [
    "ACTIVATIONS",
    "Blind",
    "Features",
    "Fixed",
    "KVPooler",
    "Learned",
    "LearnedNetwork",
    "Planned",
    "Policy",
    "Random",
    "ReadsActivations",
    "Scheduler",
    "Setting",
    "TrainReport",
    "build",
    "check_options",
    "label",
    "load_network",
    "policies",
    "policy_file",
    "policy_names",
    "save_network",
    "train",
    "trained_for",
]
