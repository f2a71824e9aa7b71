"""Joint nested quantisation: one code a weight, whose prefixes serve every precision, under a full second moment.

It knows a weight matrix and the second moment of its inputs, not where they come from; ``nested`` is the format.

The loss of a row w at precision b is ``(w - q_b) H (w - q_b)^T`` with H the (gradient-weighted) second moment of the
layer's inputs, and q_b the values that the first b bits of the codes select in that precision's table. The codes of
all precisions are chosen together, so as to minimise the sum over precisions of each one's loss over its loss at the
start, those above ``focus_bits`` counting less. From exact k-means on, the columns are

1. *assigned* in turn, those with most energy first, each precision's own error fed back into the columns still to
   come (optimal brain surgeon, Hassibi and Stork 1993; its column order as in GPTQ, Frantar et al. 2023);
2. each precision's tables are *refitted* to their labels (conjugate gradients on the normal equations);
3. the codes *descend*, a column at a time with everything else fixed, and tables are refitted again.

Steps 2 and 3 never raise the loss. All rows of a layer move together, on the device of the tensors, in float32; where
there is TF32 (GPUs), products round their inputs to it, as all of them have errors, and no weights, as a factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pmpd.quant import joint_cpu, joint_cuda, joint_start, joint_torch
from pmpd.quant.nested import MAX_BITS, NestedWeight, pack
from pmpd.quant.sparse import Outliers, highest, take_outliers

BLOCK_COLUMNS = 64
"""Columns between two updates of all the columns to come: those within a block are updated one by one."""

LEAST_SHARE = 0.05
"""Least share of a precision, however high: with less, 8 bits end worse than any-precision's (docs/quantisers.md)."""

LEAST_LOSS = 1e-9
"""Least scale of a loss, relative to the row's energy: a row that a precision hits exactly does not outweigh others."""

CONVERGED = 1e-12
"""Share of a row's squared residual at which its refit ends: what is then left is rounding, and would grow."""

CLIP = 3.0
"""Deviations of a row beyond which a weight has no say in where clusters for the choice of outliers are."""


@dataclass(frozen=True)
class JointOptions:
    """How hard to search.

    Attributes:
        focus_bits: precisions up to this one count the same.
        high_share: each further bit counts this share of the bit before, down to ``LEAST_SHARE``: what the codes lose
            at 5 to 8 bits, where there is little to lose, they gain below.
        damping: share of H's mean diagonal that is added to it.
        refits: conjugate-gradient steps of a refit.
        sweeps: descents over the codes.
        outlier_share: share of the weights that a sparse float16 term takes.
    """

    focus_bits: int = 4
    high_share: float = 0.25
    damping: float = 0.01
    refits: int = 3
    sweeps: int = 2
    outlier_share: float = 0.0


def quantize_jointly(
    weight: Tensor,
    moment: Tensor,
    *,
    seed_bits: int = 2,
    parent_bits: int = 8,
    group_size: int | None = None,
    options: JointOptions = JointOptions(),
) -> NestedWeight:
    """Quantise ``weight`` to every precision from ``seed_bits`` to ``parent_bits``.

    Args:
        weight: ``[out, in]``, any floating dtype.
        moment: ``[in, in]``, symmetric and not negative definite; may be rank-deficient. Its scale does not matter.
        group_size: columns that share a table; ``None`` for whole rows.

    Raises:
        ValueError: shapes that differ, bits or options out of range, values that are not finite.
    """
    if not 1 <= seed_bits <= parent_bits <= MAX_BITS:
        raise ValueError(f"need 1 <= seed_bits <= parent_bits <= {MAX_BITS}, got {seed_bits} and {parent_bits}")
    if weight.dim() != 2 or list(moment.shape) != [weight.shape[1]] * 2:
        raise ValueError(f"weight [out, in] needs a moment [in, in], got {list(weight.shape)} and {list(moment.shape)}")
    if not (torch.isfinite(weight).all() and torch.isfinite(moment).all()):
        raise ValueError("weight and moment must be finite")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be >= 1 or None, got {group_size}")
    if not 0 < options.high_share <= 1:
        raise ValueError(f"high_share must be above 0 and at most 1, got {options.high_share}")
    if not options.damping > 0:
        raise ValueError(f"damping must be above 0, as a moment may be rank-deficient, got {options.damping}")
    if not 0 <= options.outlier_share <= 1:
        raise ValueError(f"outlier_share must be 0 to 1, got {options.outlier_share}")
    weight, moment = weight.float(), damped(moment.float(), options.damping)
    outliers = None
    if options.outlier_share:
        weight, outliers = set_aside(weight, moment.diagonal(), options.outlier_share, seed_bits, group_size)
    with fast_products():
        solver = Joint(weight, moment, range(seed_bits, parent_bits + 1), group_size, options)
        solver.assign()
        solver.refit(options.refits)
        for _ in range(options.sweeps):
            solver.descend()
            solver.refit(options.refits)
    return solver.result(outliers)


@contextmanager
def fast_products() -> Iterator[None]:
    """Within it float32 products may round their inputs to TF32 (10 bits): for errors and gradients.

    GPUs do; of CPUs those on which oneDNN has it (AMX-FP16).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def set_aside(
    weight: Tensor, energy: Tensor, share: float, bits: int, group_size: int | None
) -> tuple[Tensor, Outliers]:
    """What is left to quantise, and the sparse term taken off it: where k-means of ``bits`` bits would lose most.

    What is left there is the value of the cluster, which every precision has near. The clusters are of rows clipped at
    ``CLIP`` deviations: else a weight far off takes one for itself and loses nothing.
    """
    middle, far = weight.mean(1, keepdim=True), CLIP * weight.std(1, keepdim=True)
    clipped = weight.clamp(middle - far, middle + far)
    codes, tables = joint_start.clusters(clipped, energy, range(bits, bits + 1), group_size)
    group_of = torch.arange(weight.shape[1], device=weight.device) // (group_size or weight.shape[1])
    near = tables[bits].flatten(1).gather(1, codes + (group_of << bits))
    chosen = highest(energy * (weight - near).square(), round(share * weight.numel()))
    outliers = take_outliers(weight, near, chosen)
    return weight.index_put(outliers.places(), -outliers.values.to(weight.dtype), accumulate=True), outliers


def damped(moment: Tensor, damping: float) -> Tensor:
    """``moment`` scaled to a mean diagonal of one, plus ``damping`` on it: positive definite whatever its rank.

    An input that never was active keeps ``damping`` alone; a moment of zeros becomes the identity.
    """
    scale = moment.diagonal().mean()
    ridge = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if not scale > 0:
        return ridge
    return (moment + moment.T) / (2 * scale) + damping * ridge


class Joint:
    """The state of one layer, columns in the order of falling energy.

    Attributes:
        codes: int64 ``[out, in]``, of the highest precision.
        tables: for each precision b, float32 ``[out, groups, 2**b]``.
        costs: float32 ``[precisions, out]``, what a unit of each precision's loss counts.
    """

    def __init__(
        self, weight: Tensor, moment: Tensor, precisions: range, group_size: int | None, options: JointOptions
    ) -> None:
        """At the start: exact k-means."""
        codes, self.tables = joint_start.clusters(weight, moment.diagonal(), precisions, group_size)
        self.order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        self.codes = codes[:, self.order].contiguous()
        self.weight = weight[:, self.order].contiguous()
        self.moment = moment[self.order][:, self.order].contiguous()
        self.precisions, self.group_size = precisions, group_size
        self.group_of = self.order // (group_size or weight.shape[1])
        self.num_groups = self.tables[precisions[0]].shape[1]
        # With H^-1 = U^T U, fixing column j at an error e costs (e / U_jj)^2 and moves column k > j by -e U_jk / U_jj.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.moment.double()))
        self.feedback = torch.linalg.cholesky(inverse, upper=True).float()
        energy = self.weight.square() @ self.moment.diagonal()
        scales = torch.stack([self.loss(b).clamp_min(1e-30 + LEAST_LOSS * energy) for b in precisions])
        shares = [max(LEAST_SHARE, options.high_share ** max(b - options.focus_bits, 0)) for b in precisions]
        self.costs = torch.tensor(shares, device=weight.device)[:, None] / scales

    def values(self, bits: int) -> Tensor:
        """float32 ``[out, in]``, the weight at ``bits``, columns in this state's order."""
        return self.tables[bits].flatten(1).gather(1, self._entries(bits))

    def loss(self, bits: int) -> Tensor:
        """``[out]``, each row's loss at ``bits``."""
        error = self.weight - self.values(bits)
        return ((error @ self.moment) * error).sum(1)

    def assign(self) -> None:
        """Codes of all columns, with error feedback, under the tables that are there."""
        moved = self.weight.expand(len(self.precisions), -1, -1).clone()
        for block in self._blocks():
            own = moved[:, :, block].contiguous()
            errors = torch.empty_like(own)
            _steps(own).assign_block(own, errors, self.feedback[block, block], *self._columns(block))
            rest = moved.flatten(0, 1)[:, block.stop :]
            rest.addmm_(errors.flatten(0, 1), self.feedback[block, block.stop :], alpha=-1)

    def descend(self) -> None:
        """The best code of each column in turn, everything else fixed."""
        values = torch.stack([self.values(b) for b in self.precisions])
        pull = (self.weight - values) @ self.moment
        for block in self._blocks():
            before = values[:, :, block]
            # A copy even of what is contiguous, as with one row and one precision.
            after, own = before.clone(memory_format=torch.contiguous_format), pull[:, :, block].contiguous()
            _steps(own).descend_block(after, own, self.moment[block, block], *self._columns(block))
            pull.flatten(0, 1).addmm_((after - before).flatten(0, 1), self.moment[block], alpha=-1)
            values[:, :, block] = after

    def result(self, outliers: Outliers | None = None) -> NestedWeight:
        """The packed weight, columns back in their places, beside the outliers that were set aside."""
        codes = torch.empty_like(self.codes)
        codes[:, self.order] = self.codes
        limit = torch.finfo(torch.float16).max
        return NestedWeight(
            pack(codes.to(torch.uint8), self.precisions[-1]).cpu(),
            {b: t.clamp(-limit, limit).half().cpu() for b, t in self.tables.items()},
            codes.shape[1],
            None if self.num_groups == 1 else self.group_size,
            None if outliers is None else outliers.to("cpu"),
        )

    def _entries(self, bits: int) -> Tensor:
        """Where in a row's tables of ``bits`` each weight's value is."""
        return (self.codes >> (self.precisions[-1] - bits)) + (self.group_of << bits)

    def refit(self, steps: int) -> None:
        """Each precision's tables, by ``steps`` of :func:`fitted`."""
        for b in self.precisions:
            table = fitted(self.tables[b].flatten(1), self._entries(b), self.weight, self.moment, steps)
            self.tables[b] = table.view_as(self.tables[b])

    def _columns(self, block: slice) -> tuple[Any, ...]:
        """What a block's steps need besides their numbers: see ``joint_torch.assign_block``."""
        tables = torch.cat([self.tables[b] for b in self.precisions], dim=2)
        return self.codes[:, block], tables, self.group_of[block], self.precisions, self.costs

    def _blocks(self) -> list[slice]:
        columns = self.weight.shape[1]
        return [slice(s, min(s + BLOCK_COLUMNS, columns)) for s in range(0, columns, BLOCK_COLUMNS)]


def fitted(table: Tensor, entries: Tensor, weight: Tensor, moment: Tensor, steps: int) -> Tensor:
    """``table`` float32 ``[out, n]`` after conjugate gradients on each row's ``A^T H A c = A^T H w``, A its labels.

    Args:
        entries: int64 ``[out, in]``, where in its row of ``table`` each weight's value is.
        weight: float32 ``[out, in]``.
        moment: float32 ``[in, in]``, H.
    """
    size = table.shape[1]
    energy = entry_sums(moment.diagonal().expand_as(weight).contiguous(), entries, size)
    inverse = torch.where(energy > 0, 1 / energy, 0.0)  # an entry that no weight uses stays
    residual = entry_sums((weight - table.gather(1, entries)) @ moment, entries, size)
    direction = inverse * residual
    rate = (residual * direction).sum(1, keepdim=True)
    least = CONVERGED * rate
    for _ in range(steps):
        image = entry_sums(direction.gather(1, entries) @ moment, entries, size)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where((curvature > 0) & (rate > least), rate / curvature, 0.0)
        table = table + step * direction
        residual = residual - step * image
        ahead = inverse * residual
        new_rate = (residual * ahead).sum(1, keepdim=True)
        direction = ahead + torch.where(rate > 0, new_rate / rate, 0.0) * direction
        rate = new_rate
    return table


def entry_sums(values: Tensor, entries: Tensor, num_entries: int) -> Tensor:
    """float32 ``[rows, num_entries]``: the sum of each row's ``values`` at its ``entries`` (int64)."""
    return _steps(values).summed(values, entries, num_entries)


def _steps(tensor: Tensor) -> ModuleType:
    return {"cpu": joint_cpu, "cuda": joint_cuda}.get(tensor.device.type, joint_torch)
