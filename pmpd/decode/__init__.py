"""Greedy decoding at precisions that change on the way: the loop, its cache, and what is shared between schedules."""

from pmpd.decode.ahead import ahead
from pmpd.decode.cache import BufferCache
from pmpd.decode.complete import finish, stream
from pmpd.decode.fastest import CPU_FORWARD, FUSED_GRAPHS, fastest, graphed
from pmpd.decode.forward import two_phase_nll, window_nll
from pmpd.decode.loop import ContextError, State, StepModel, context_limit, decode, prefill
from pmpd.decode.random import random_llama
from pmpd.decode.tree import TreeStats, decode_schedules, decode_tree

__all__ = [
    "CPU_FORWARD",
    "FUSED_GRAPHS",
    "BufferCache",
    "ContextError",
    "State",
    "StepModel",
    "TreeStats",
    "ahead",
    "context_limit",
    "decode",
    "decode_schedules",
    "decode_tree",
    "fastest",
    "finish",
    "graphed",
    "prefill",
    "random_llama",
    "stream",
    "two_phase_nll",
    "window_nll",
]
