// The column steps of joint quantisation on a GPU, a warp a row. joint_torch.py defines what they compute; joint_cuda.py
// launches them. Precisions are first .. first + num - 1, and their tables lie end to end.

constexpr int LANES = 32;
constexpr int WARPS = 4;
constexpr int COLUMNS = 64;     // joint.BLOCK_COLUMNS
constexpr int PRECISIONS = 8;   // nested.MAX_BITS
constexpr unsigned ALL = 0xffffffffu;

__device__ int offset_of(int first, int s) { return (1 << (first + s)) - (1 << first); }

// The code of least summed cost, the first of equals: the same in every lane.
__device__ int nearest(const float* targets, const float* costs, const float* table, int first, int num) {
    const int lane = threadIdx.x % LANES;
    const int codes = 1 << (first + num - 1);
    float best = __int_as_float(0x7f800000);
    int code = 0;
    for (int c = lane; c < codes; c += LANES) {
        float cost = 0.0f;
        for (int s = 0; s < num; s++) {
            const float d = targets[s * COLUMNS] - table[offset_of(first, s) + (c >> (num - 1 - s))];
            cost += d * d * costs[s];
        }
        if (cost < best) {
            best = cost;
            code = c;
        }
    }
    for (int mask = LANES / 2; mask; mask /= 2) {
        const float other_best = __shfl_xor_sync(ALL, best, mask);
        const int other_code = __shfl_xor_sync(ALL, code, mask);
        if (other_best < best || (other_best == best && other_code < code)) {
            best = other_best;
            code = other_code;
        }
    }
    return code;
}

extern "C" __global__ void assign_block(const float* moved, float* errors, const float* feedback, long long* codes,
                                        int codes_stride, const float* tables, const long long* groups,
                                        int num_groups, const float* costs, int first, int num, int rows, int columns) {
    __shared__ float all_targets[WARPS][PRECISIONS * COLUMNS], all_errors[WARPS][PRECISIONS * COLUMNS];
    __shared__ float all_costs[WARPS][PRECISIONS];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * WARPS + warp;
    if (row >= rows) return;
    float *targets = all_targets[warp], *own_errors = all_errors[warp], *own_costs = all_costs[warp];
    const int entries = offset_of(first, num);
    for (int s = 0; s < num; s++) {
        if (lane == 0) own_costs[s] = costs[s * (long long)rows + row];
        for (int k = lane; k < columns; k += LANES)
            targets[s * COLUMNS + k] = moved[(s * (long long)rows + row) * columns + k];
    }
    __syncwarp();
    for (int j = 0; j < columns; j++) {
        const float* table = tables + (row * num_groups + groups[j]) * entries;
        const int code = nearest(targets + j, own_costs, table, first, num);
        if (lane == 0) codes[row * codes_stride + j] = code;
        for (int s = 0; s < num; s++) {
            const float value = table[offset_of(first, s) + (code >> (num - 1 - s))];
            const float error = (targets[s * COLUMNS + j] - value) / feedback[j * columns + j];
            if (lane == 0) own_errors[s * COLUMNS + j] = error;
            for (int k = lane; k < columns; k += LANES)
                if (k > j) targets[s * COLUMNS + k] -= error * feedback[j * columns + k];
        }
        __syncwarp();
    }
    for (int s = 0; s < num; s++)
        for (int k = lane; k < columns; k += LANES)
            errors[(s * (long long)rows + row) * columns + k] = own_errors[s * COLUMNS + k];
}

extern "C" __global__ void descend_block(float* values, const float* pull, const float* moment, long long* codes,
                                         int codes_stride,
                                         const float* tables, const long long* groups, int num_groups,
                                         const float* costs, int first, int num, int rows, int columns) {
    __shared__ float all_values[WARPS][PRECISIONS * COLUMNS], all_pulls[WARPS][PRECISIONS * COLUMNS];
    __shared__ float all_targets[WARPS][PRECISIONS * COLUMNS], all_costs[WARPS][PRECISIONS];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * WARPS + warp;
    if (row >= rows) return;
    float *own_values = all_values[warp], *own_pull = all_pulls[warp], *own_costs = all_costs[warp];
    float* targets = all_targets[warp];  // of one column, spaced as nearest() wants them
    const int entries = offset_of(first, num);
    for (int s = 0; s < num; s++) {
        if (lane == 0) own_costs[s] = costs[s * (long long)rows + row];
        for (int k = lane; k < columns; k += LANES) {
            own_values[s * COLUMNS + k] = values[(s * (long long)rows + row) * columns + k];
            own_pull[s * COLUMNS + k] = pull[(s * (long long)rows + row) * columns + k];
        }
    }
    __syncwarp();
    for (int j = 0; j < columns; j++) {
        const float* table = tables + (row * num_groups + groups[j]) * entries;
        if (lane < num)
            targets[lane * COLUMNS] =
                own_values[lane * COLUMNS + j] + own_pull[lane * COLUMNS + j] / moment[j * columns + j];
        __syncwarp();
        const int code = nearest(targets, own_costs, table, first, num);
        if (lane == 0) codes[row * codes_stride + j] = code;
        for (int s = 0; s < num; s++) {
            const float value = table[offset_of(first, s) + (code >> (num - 1 - s))];
            const float change = value - own_values[s * COLUMNS + j];
            for (int k = lane; k < columns; k += LANES)
                own_pull[s * COLUMNS + k] -= change * moment[j * columns + k];
            __syncwarp();
            if (lane == 0) own_values[s * COLUMNS + j] = value;
        }
        __syncwarp();
    }
    for (int s = 0; s < num; s++)
        for (int k = lane; k < columns; k += LANES)
            values[(s * (long long)rows + row) * columns + k] = own_values[s * COLUMNS + k];
}

// Sums of a row's values by entry. Each lane has its own sums, added in a fixed order: the same result in every run.
extern "C" __global__ void summed(const float* values, const long long* entries, float* totals, int rows, int length,
                                  int num_entries, int chunk) {
    extern __shared__ float all_sums[];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * (blockDim.x / LANES) + warp;
    if (row >= rows) return;
    float* sums = all_sums + warp * chunk * LANES;
    const int start = blockIdx.y * chunk;
    for (int e = 0; e < chunk; e++) sums[e * LANES + lane] = 0.0f;
    for (int i = lane; i < length; i += LANES) {
        const int e = (int)entries[row * length + i] - start;
        if (e >= 0 && e < chunk) sums[e * LANES + lane] += values[row * length + i];
    }
    __syncwarp();
    for (int e = lane; e < chunk && start + e < num_entries; e += LANES) {
        float total = 0.0f;
        for (int k = 0; k < LANES; k++) total += sums[e * LANES + (k + lane) % LANES];
        totals[row * num_entries + start + e] = total;
    }
}
