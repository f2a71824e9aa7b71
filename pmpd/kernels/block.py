"""What one decode step of a Llama-family model does between its products, as CUDA kernels on the current stream.

The kernels are ``block.cu``; here are their shapes and launches. The definition is ``pmpd.decode.llama``.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

import torch
from torch import Tensor

from pmpd.kernels import launch, nvrtc
from pmpd.kernels.launch import MAX_ROWS
from pmpd.kernels.product import describe

FIRST_COLUMNS = 2
KEPT = FIRST_COLUMNS + MAX_ROWS
ADDRESSES = KEPT + 2
"""Places in the binding, see ``block.cu``."""

NORM_THREADS, GATE_THREADS, CHOOSE_THREADS, ATTEND_THREADS = 512, 128, 256, 128
CLUSTERS = (8, 4, 2, 1)
"""Blocks of attention that may join their shares in shared memory; more are not sure to find room."""
STATIC_BYTES = 48 * 1024
"""Shared memory that a block may declare itself."""
MAX_HIDDEN = NORM_THREADS * 32
HEAD_DIMS = (16, 32, 64, 128, 256)
MAX_GROUP = 8
CHOOSE_BLOCKS = 64
BLOCKS_A_PROCESSOR = 2
MAX_SPLITS = 32
"""Blocks of attention at most: over all heads and rows, and for one head."""


class BlockKernels:
    """The kernels for models of one head size, head grouping and dtype, and their scratch memory.

    Every launch is programmatic: it may start while the kernel before it in the stream ends.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, clusters: bool = True
    ) -> None:
        """``clusters``: whether attention's blocks may form clusters, where the GPU has them.

        Raises:
        ValueError: sizes or a dtype that :func:`not_supported` names a reason against.
        CudaUnavailableError, RuntimeError: as :func:`pmpd.kernels.nvrtc.compile`.
        """
        if reason := not_supported(num_heads, num_kv_heads, head_dim, dtype):
            raise ValueError(reason)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        group = num_heads // num_kv_heads
        gpu = describe(torch.cuda.current_device())
        self._cluster = max_cluster(group, head_dim) if clusters and gpu.clusters else 1
        module = nvrtc.compile(source(), options(group, head_dim, dtype, self._cluster))
        self._norm, self._gate = module["rms_norm"], module["gate"]
        self._choose, self._attend = module["choose"], module["attend"]
        self._processors = gpu.processors
        self._reserved = reserved_bytes(group, head_dim, gpu.shared_bytes, self._cluster)
        most = MAX_ROWS * num_kv_heads + BLOCKS_A_PROCESSOR * gpu.processors
        self._partials = torch.zeros(most * group * (head_dim + 4), device="cuda")
        self._arrivals = torch.zeros(MAX_ROWS * num_kv_heads, dtype=torch.int32, device="cuda")
        self._best = torch.zeros(MAX_ROWS, dtype=torch.int64, device="cuda")
        self._chosen = torch.zeros(MAX_ROWS + 1, dtype=torch.int32, device="cuda")

    def norm(self, x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
        """``out`` = root-mean-square norm of ``x``, times ``weight``; both are ``[rows, size]``."""
        rows, size = x.shape
        assert size % 8 == 0
        assert size <= MAX_HIDDEN
        self._norm((rows,), (NORM_THREADS,), x, weight, out, size, eps, programmatic=True)

    def gate(self, gate_up: Tensor, out: Tensor) -> None:
        """``out [rows, size] = silu(gate) * up`` of ``gate_up [rows, 2 * size]``, in turns (``gated.py``)."""
        rows, size = out.shape
        assert size % 8 == 0
        grid = (-(-size // (8 * GATE_THREADS)), rows)
        self._gate(grid, (GATE_THREADS,), gate_up, out, size, programmatic=True)

    def attend(
        self, qkv: Tensor, bias: Tensor | None, turns: Tensor, binding: Tensor, layer: int, scale: float, out: Tensor
    ) -> None:
        """Attention of one position a row over the cache, to which its keys and values are appended.

        Args:
            qkv: ``[rows, (heads + 2 * kv_heads) * head_dim]``, before bias and rotation.
            bias: of ``qkv``.
            turns: float32 ``[positions, head_dim / 2, 2]``, cosine and sine.
            binding: the sequence at hand, see ``block.cu``.
            out: ``[rows, heads * head_dim]``.
        """
        rows = len(qkv)
        splits, cluster = divide(rows * self.num_kv_heads, self._processors, self._cluster)
        grid = (splits, self.num_kv_heads, rows)
        arguments = (qkv, bias, turns, binding, layer, scale, self._partials, self._arrivals, out)
        self._attend(
            grid, (ATTEND_THREADS,), *arguments, shared_bytes=self._reserved, programmatic=True, cluster=cluster
        )

    def choose(self, logits: Tensor, tokens: Tensor, binding: Tensor) -> None:
        """``tokens [rows]`` = the first of the largest of ``logits [rows, vocab]``; both are kept where the binding
        says, and its column is counted up."""
        rows, vocab = logits.shape
        arguments = (logits, vocab, tokens, self._best, self._chosen, binding)
        self._choose((CHOOSE_BLOCKS, rows), (CHOOSE_THREADS,), *arguments, programmatic=True)


def not_supported(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why there are no kernels for such a model; None if there are."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the fused kernels are for float16 and bfloat16, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the fused kernels are for heads of {', '.join(map(str, HEAD_DIMS))} channels, not {head_dim}"
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        return (
            f"the fused kernels are for up to {MAX_GROUP} query heads a key-value head, not {num_heads}/{num_kv_heads}"
        )
    return None


def divide(heads: int, processors: int, most: int) -> tuple[int, int]:
    """Blocks of attention for each of ``heads`` key-value heads of all rows, and how many of them form a cluster: all
    or none (1).

    One cluster of up to ``most`` where that makes more than three quarters of a block a processor, otherwise
    ``BLOCKS_A_PROCESSOR`` a processor without clusters. Several clusters a head were tried and are not there
    (docs/decoding.md has the times).
    """
    splits = min(max(1, BLOCKS_A_PROCESSOR * processors // heads), MAX_SPLITS)
    cluster = next(size for size in CLUSTERS if size <= min(splits, most))
    return (cluster, cluster) if cluster > 1 and 4 * heads * cluster > 3 * processors else (splits, 1)


def static_bytes(group: int, head_dim: int, cluster: int) -> int:
    """Shared memory that a block of attention declares itself, at most: shares of its warps and of its cluster's other
    blocks, what joining without a cluster needs, and a barrier."""
    shares = ATTEND_THREADS // 32 + max(1, cluster - 1)
    return 4 * group * (shares * (head_dim + 4) + 2 * MAX_SPLITS) + 16


def max_cluster(group: int, head_dim: int) -> int:
    """Blocks of attention whose shares one of them has room for."""
    return next(size for size in CLUSTERS if size == 1 or static_bytes(group, head_dim, size) <= STATIC_BYTES)


def reserved_bytes(group: int, head_dim: int, shared: int, cluster: int) -> int:
    """Dynamic shared memory, unused, that keeps attention's blocks apart: ``BLOCKS_A_PROCESSOR`` of them beside a
    product's (:func:`pmpd.kernels.launch.reserved_bytes`), where they are not larger themselves."""
    room = shared - launch.reserved_bytes(shared, alone=True)
    each = room // BLOCKS_A_PROCESSOR - launch.RESERVED_BYTES - static_bytes(group, head_dim, cluster)
    return max(0, each // 128 * 128)


def options(group: int, head_dim: int, dtype: torch.dtype, cluster: int) -> list[str]:
    """For the compiler."""
    choices = {"HEAD_DIM": head_dim, "GROUP": group, "THREADS": ATTEND_THREADS, "CLUSTER": cluster}
    return [f"-D{name}={value}" for name, value in choices.items()] + ["-DBF16"] * (dtype == torch.bfloat16)


@cache
def source() -> str:
    """The program, CUDA C++."""
    files = resources.files("pmpd.kernels")
    return "".join((files / name).read_text(encoding="utf-8") for name in ("cluster.cu", "block.cu"))
