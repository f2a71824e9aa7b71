"""How long the NPU model takes for many random machines: single forwards at every precision, and a whole schedule.

python benchmarks/npu_sweep.py --machines 100000
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time

import numpy as np

from pmpd.hardware.npu import NPU, decode_forward, decode_steps_s, prefill_forward, published_shapes

BITS = (16, 4, 3, 2)
SCHEDULE = [3] * 40 + [2] * 79
CHUNK = 2000
"""Machines at a time in whole schedules: a float64 for each of their steps is 2 MB."""


def machines(count: int, seed: int = 0) -> NPU:
    """Machines drawn log-uniformly around the paper's, as one NPU whose numbers are arrays ``[count]``."""
    rng = np.random.default_rng(seed)

    def log_uniform(low: float, high: float) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high), count))

    return NPU(
        "random",
        num_macs=log_uniform(1 << 10, 1 << 18),
        clock_hz=log_uniform(1e8, 3e9),
        bandwidth_bytes_s=log_uniform(1e10, 4e12),
        matrix_tile_tokens=128,
        matrix_tile_outputs=2,
        matrix_tile_inputs=16,
        matrix_vector_utilisation=rng.uniform(0.1, 1, count),
        vector_lanes=log_uniform(8, 1024),
        activation_buffer_bytes=log_uniform(1 << 18, 1 << 26),
        weight_buffer_bytes=log_uniform(1 << 18, 1 << 26),
        count_head=True,
        count_tables=True,
    )


def part(npu: NPU, rows: slice) -> NPU:
    """Some machines, with an axis for the steps of a schedule."""
    arrays = {f.name: getattr(npu, f.name) for f in dataclasses.fields(npu)}
    return dataclasses.replace(npu, **{k: v[rows, None] for k, v in arrays.items() if isinstance(v, np.ndarray)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=100_000)
    count = parser.parse_args().machines
    npu, shape = machines(count), published_shapes()["vicuna7b"]

    start = time.perf_counter()
    for bits in BITS:
        decode_forward(npu, shape, bits, 1100)
        prefill_forward(npu, shape, bits, 1100)
    forwards_s = time.perf_counter() - start
    print(f"{count} machines x (prefill, decode step) x {len(BITS)} precisions: {forwards_s:.2f} s")

    start = time.perf_counter()
    total = np.concatenate(
        [
            decode_steps_s(part(npu, slice(i, i + CHUNK)), shape, 1040, SCHEDULE).sum(axis=-1)
            for i in range(0, count, CHUNK)
        ]
    )
    schedules_s = time.perf_counter() - start
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(total)} machines x a schedule of {len(SCHEDULE)} steps: {schedules_s:.2f} s, peak {peak_mib:.0f} MiB")


if __name__ == "__main__":
    main()
