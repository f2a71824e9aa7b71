// The small kernels between the products of one decode step of a Llama-family model, for up to 8 sequences. After cluster.cu.
//
// Compiled for one model: HEAD_DIM (8 * a power of two, at most 256), GROUP (query heads a key-value head), BF16, THREADS of
// a block of attention and CLUSTER blocks of it at most that join what they have in shared memory.
// Arithmetic is float32; what is stored is rounded to 16 bits where transformers rounds.
//
// binding, int64, in device memory, is what a graph that was captured once reads of the sequence at hand:
//   [0] the column that this step writes, counted up by the step's last kernel
//   [1] capacity of the cache in columns
//   [2 .. 9] first column of each row (left padding before it)
//   [10] address of the chosen tokens of all columns, int64 [capacity, 8]
//   [11] address of the last step's logits, [rows, vocab]
//   [12 + 2 * layer], [13 + 2 * layer] addresses of keys and values, [rows, kv_heads, capacity, HEAD_DIM]

#define FIRST_COLUMNS 2
#define MAX_ROWS 8
#define KEPT_TOKENS 10
#define KEPT_LOGITS 11
#define ADDRESSES 12
#define MINUS_INFINITY __int_as_float(0xff800000)

__device__ __forceinline__ float wide(u16 value) {
#ifdef BF16
    return __uint_as_float((u32)value << 16);
#else
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
#endif
}

__device__ __forceinline__ u16 narrow(float value) {
    u16 result;
#ifdef BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
#endif
    return result;
}

__device__ __forceinline__ float rounded(float value) { return wide(narrow(value)); }

__device__ __forceinline__ void unpack(const uint4& packed, float* values) {
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = wide((u16)(words[i] & 0xffff));
        values[2 * i + 1] = wide((u16)(words[i] >> 16));
    }
}

__device__ __forceinline__ uint4 pack(const float* values) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = (u32)narrow(values[2 * i]) | ((u32)narrow(values[2 * i + 1]) << 16);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// 16 bytes, or zero. Written out because the compiler moves an ordinary load to where it is used, past what it should
// overlap with.
__device__ __forceinline__ uint4 load_if(bool there, const uint4* from) {
    uint4 v;
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        " @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(from), "r"((u32)there)
        : "memory");
    return v;
}

// Into the L2 cache: nobody waits for it. Both are multiples of 16 bytes.
__device__ __forceinline__ void prefetch(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// What a kernel does before the one ahead of it in the stream has finished is what stands before wait_for_previous().
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Counts this block in and returns how many were before it. What the block wrote before a barrier ahead of this is then
// seen by whoever counts after it (release and acquire; a fence of every thread would cost more).
__device__ __forceinline__ u32 arrive(u32* counter) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// out = norm(x) * weight. One block of 512 threads a row; size is divisible by 8 and at most 16384.
extern "C" __global__ void __launch_bounds__(512) rms_norm(
    const u16* x, const u16* weight, u16* out, int size, float eps) {
    const int vectors = size / 8;
    const uint4* own = (const uint4*)(x + (long long)blockIdx.x * size);
    float values[4][8];
    float squares = 0.f;
    __shared__ float sums[16];
    uint4 weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (threadIdx.x + i * 512 < vectors) weights[i] = ((const uint4*)weight)[threadIdx.x + i * 512];
    wait_for_previous();
    let_next_start();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int v = threadIdx.x + i * 512;
        if (v < vectors) {
            unpack(own[v], values[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) squares += values[i][j] * values[i][j];
        }
    }
#pragma unroll
    for (int lane = 16; lane; lane /= 2) squares += __shfl_xor_sync(0xffffffff, squares, lane);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int warp = 0; warp < 16; warp++) squares += sums[warp];
    const float scale = rsqrtf(squares / size + eps);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int v = threadIdx.x + i * 512;
        if (v < vectors) {
            float result[8];
            unpack(weights[i], result);
#pragma unroll
            for (int j = 0; j < 8; j++) result[j] *= rounded(values[i][j] * scale);
            ((uint4*)(out + (long long)blockIdx.x * size))[v] = pack(result);
        }
    }
}

// out [rows, size] = silu(gate) * up of gate_up [rows, 2 * size], eight gates and eight ups in turns. One thread for 8
// values.
extern "C" __global__ void __launch_bounds__(128) gate(const u16* gate_up, u16* out, int size) {
    const int v = blockIdx.x * 128 + threadIdx.x, row = blockIdx.y;
    wait_for_previous();
    let_next_start();
    if (v >= size / 8) return;
    const uint4* own = (const uint4*)(gate_up + 2ll * row * size) + 2 * v;
    float g[8], up[8];
    unpack(own[0], g);
    unpack(own[1], up);
#pragma unroll
    for (int j = 0; j < 8; j++) g[j] = rounded(g[j] / (1.f + __expf(-g[j]))) * up[j];
    ((uint4*)(out + (long long)row * size))[v] = pack(g);
}

// Greedy choice: the first of the largest of logits [rows, vocab]; grid (blocks, rows). Keeps it and the logits where the
// binding says, and counts the column up. best [rows] and arrivals [MAX_ROWS + 1] are zero before and after.
extern "C" __global__ void __launch_bounds__(256) choose(
    const u16* logits, int vocab, long long* tokens, u64* best, u32* arrivals, long long* binding) {
    const int row = blockIdx.y;
    const u16* own = logits + (long long)row * vocab;
    u64 key = 0;
    wait_for_previous();
    let_next_start();
    u16* kept = (u16*)binding[KEPT_LOGITS] + (long long)row * vocab;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < vocab; i += gridDim.x * 256) {
        const u16 logit = own[i];
        kept[i] = logit;
        u32 bits = __float_as_uint(wide(logit));
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // the order of floats as that of unsigned integers
        const u64 candidate = ((u64)bits << 32) | (u32)~i;
        key = candidate > key ? candidate : key;
    }
#pragma unroll
    for (int lane = 16; lane; lane /= 2) {
        const u64 other = __shfl_xor_sync(0xffffffff, key, lane);
        key = other > key ? other : key;
    }
    __shared__ u64 keys[8];
    if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = key;
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < 8; warp++) key = keys[warp] > key ? keys[warp] : key;
    atomicMax(best + row, key);
    if (arrive(arrivals + row) + 1 < gridDim.x) return;
    const long long token = (u32)~(u32)atomicExch(best + row, 0ull);
    tokens[row] = token;
    ((long long*)binding[KEPT_TOKENS])[binding[0] * MAX_ROWS + row] = token;
    arrivals[row] = 0;
    if (gridDim.y > 1) {  // others may not have read the column
        if (arrive(arrivals + MAX_ROWS) + 1 < gridDim.y) return;
        arrivals[MAX_ROWS] = 0;
    }
    binding[0] += 1;
}

#define LANES (HEAD_DIM / 8)        // lanes that share a column, 8 channels (16 bytes) each
#define SLOTS (THREADS / LANES)     // columns that a block looks at at once
#define DEPTH 4                     // of these, loaded ahead
#define PREFETCHED (3 * SLOTS * DEPTH)  // columns brought into the L2 cache ahead: all of a long context do not stay there
#define MAX_SPLITS 32
#define PARTIAL (HEAD_DIM + 4)      // unnormalised output, its largest score, its sum of weights, 8 bytes of padding

__device__ __forceinline__ void rotated(
    const u16* head, const u16* bias, const float2* turns, int lane, float* values) {  // turns: this lane's 8
    float other[8], shift[8];
    const int half = LANES / 2;
    const int partner = lane < half ? lane + half : lane - half;
    unpack(((const uint4*)head)[lane], values);
    unpack(((const uint4*)head)[partner], other);
    if (bias) {
        unpack(((const uint4*)bias)[lane], shift);
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] = rounded(values[j] + shift[j]);
        unpack(((const uint4*)bias)[partner], shift);
#pragma unroll
        for (int j = 0; j < 8; j++) other[j] = rounded(other[j] + shift[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        values[j] = values[j] * turns[j].x + (lane < half ? -other[j] : other[j]) * turns[j].y;
    }
}

__device__ __forceinline__ uint4 value_of(const u16* own, const u16* bias, int at, int lane) {
    uint4 packed = ((const uint4*)(own + at))[lane];
    if (bias) {
        float sum[8], shift[8];
        unpack(packed, sum);
        unpack(((const uint4*)(bias + at))[lane], shift);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += shift[j];
        packed = pack(sum);
    }
    return packed;
}

// This thread's part of DEPTH columns from base on; zero beyond the end and at the new column, not written yet.
__device__ __forceinline__ void load(
    const u16* keys, const u16* values, int base, int end, int column, int slot, int lane, uint4* key, uint4* value) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        const int c = base + d * SLOTS + slot;
        const bool there = c < end && c != column;
        const long long at = (long long)c * HEAD_DIM;
        key[d] = load_if(there, (const uint4*)(keys + at) + lane);
        value[d] = load_if(there, (const uint4*)(values + at) + lane);
    }
}

// Four channels of a share's sum, of which weights are relative to another largest score, and its sum of weights.
__device__ __forceinline__ void add_share(
    const float* values, float weight, float sum_of_weights, float& weights, float* result) {
    weights += weight * sum_of_weights;
#pragma unroll
    for (int j = 0; j < 4; j++) result[j] += weight * values[j];
}

// Four channels of several shares' sums, and what add_share needs of them.
struct Joined {
    float top = MINUS_INFINITY, weights = 0.f, result[4] = {};

    // `count` shares in shared memory, `pitch` apart, one with a column at least among all so far.
    __device__ __forceinline__ void add(const float* shares, int count, int pitch, int channel) {
        const float before = top;
        for (int s = 0; s < count; s++) top = fmaxf(top, shares[s * pitch + HEAD_DIM]);
        const float shrink = exp2f(before - top);
        weights *= shrink;
#pragma unroll
        for (int j = 0; j < 4; j++) result[j] *= shrink;
        for (int s = 0; s < count; s++) {
            const float* of = shares + s * pitch;
            add_share(of + channel, exp2f(of[HEAD_DIM] - top), of[HEAD_DIM + 1], weights, result);
        }
    }
};

// Sums of a warp's lanes for the same channels, LANES apart: all get the sum over all.
__device__ __forceinline__ void join_lanes(float& largest, float& total, float (&sum)[8]) {
    float top = largest;
#pragma unroll
    for (int d = LANES; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
    const float shrink = top == MINUS_INFINITY ? 0.f : exp2f(largest - top);
    largest = top;
    total *= shrink;
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] *= shrink;
#pragma unroll
    for (int d = LANES; d < 32; d *= 2) {
        total += __shfl_xor_sync(0xffffffff, total, d);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += __shfl_xor_sync(0xffffffff, sum[j], d);
    }
}

__device__ __forceinline__ void write_output(u16* out, long long at, float weights, const float* result) {
    u32 words[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
        words[j] = (u32)narrow(result[2 * j] / weights) | ((u32)narrow(result[2 * j + 1] / weights) << 16);
    *(uint2*)(out + at) = make_uint2(words[0], words[1]);
}

// Attention of one new position over the cache, to which its keys and values are appended: grid (splits, kv_heads,
// rows), at most MAX_SPLITS of them. Each block takes a share of the columns. If a head's blocks are a cluster, the first of
// them joins their shares, otherwise the last to finish.
// qkv [rows, (heads + 2 * kv_heads) * HEAD_DIM] before rotation; turns [positions, HEAD_DIM / 2] cosine and sine;
// partials [rows, kv_heads, splits, GROUP, PARTIAL]; arrivals [rows, kv_heads], zero before and after;
// out [rows, heads * HEAD_DIM]. With three heads the compiler would take registers that leave no room beside a product.
extern "C" __global__ void __launch_bounds__(THREADS, (GROUP == 1 ? 4 : GROUP <= 3 ? 3 : 2) * 128 / THREADS) attend(
    const u16* qkv, const u16* bias, const float2* turns, const long long* binding, int layer, float scale,
    float* partials, u32* arrivals, u16* out) {
    const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, kv_heads = gridDim.y, row = blockIdx.z;
    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES, heads = kv_heads * GROUP;
    __shared__ __align__(16) float shared[THREADS / 32][GROUP][PARTIAL];
    __shared__ __align__(16) float sent[CLUSTER > 1 ? CLUSTER - 1 : 1][GROUP][PARTIAL];  // by the cluster's other blocks
    __shared__ u64 barrier;
    __shared__ float tops[GROUP][MAX_SPLITS], sums[GROUP][MAX_SPLITS];
    __shared__ bool last_to_finish;
    // The kernel before this one makes qkv. Binding and older columns are of earlier steps: read before it ends.
    const int column = (int)binding[0], start = (int)binding[FIRST_COLUMNS + row];
    const long long capacity = binding[1];
    const long long offset = ((long long)row * kv_heads + kv_head) * capacity * HEAD_DIM;
    u16* keys = (u16*)binding[ADDRESSES + 2 * layer] + offset;
    u16* values = (u16*)binding[ADDRESSES + 2 * layer + 1] + offset;
    const int count = column + 1 - start;
    const int share = max(SLOTS * DEPTH, ((count + splits - 1) / splits + SLOTS - 1) / SLOTS * SLOTS);
    const int first = start + split * share, end = min(first + share, column + 1);
    const int shares = (count + share - 1) / share;  // short sequences do not need all splits
    const bool clustered = cluster_size() > 1;
    const int senders = clustered ? shares - 1 : 0;  // to the first block
    const Inbox inbox = {shared_address(&barrier)};
    if (split == 0 && threadIdx.x == 0) inbox.open(senders * sizeof(sent[0]));
    cluster_arrive();
    if (split >= shares) {
        wait_for_previous();  // every block does, so that this kernel ends after the one before it
        return;
    }

    const u16* own = qkv + (long long)row * (heads + 2 * kv_heads) * HEAD_DIM;
    const float2* angles = turns + (long long)(column - start) * (HEAD_DIM / 2) + lane % (LANES / 2) * 8;
    float2 turn[8];
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const uint4 pair = load_if(true, (const uint4*)(angles + j));
        turn[j] = make_float2(__uint_as_float(pair.x), __uint_as_float(pair.y));
        turn[j + 1] = make_float2(__uint_as_float(pair.z), __uint_as_float(pair.w));
    }
    uint4 key[DEPTH], value[DEPTH];
    load(keys, values, first, end, column, slot, lane, key, value);
    const int later = first + SLOTS * DEPTH;
    if (threadIdx.x == 0 && later < end) {
        const u32 bytes = min(end - later, PREFETCHED) * HEAD_DIM * 2;
        prefetch(keys + (long long)later * HEAD_DIM, bytes);
        prefetch(values + (long long)later * HEAD_DIM, bytes);
    }
    wait_for_previous();
    let_next_start();

    float q[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const int at = (kv_head * GROUP + g) * HEAD_DIM;
        rotated(own + at, bias ? bias + at : nullptr, turn, lane, q[g]);
#pragma unroll
        for (int j = 0; j < 8; j++) q[g][j] = rounded(q[g][j]) * scale * 1.44269504f;  // weights are powers of two
    }
    float largest[GROUP], total[GROUP], sum[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        largest[g] = MINUS_INFINITY;
        total[g] = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[g][j] = 0.f;
    }
    for (int base = first; base < end; base += SLOTS * DEPTH) {
        const bool holds_new = column < end && column - base < SLOTS * DEPTH && (column - base) % SLOTS == slot;
        if (holds_new) {
            const int at = (heads + kv_head) * HEAD_DIM;
            float new_key[8];
            rotated(own + at, bias ? bias + at : nullptr, turn, lane, new_key);
            const uint4 packed = pack(new_key), new_value = value_of(own, bias, at + kv_heads * HEAD_DIM, lane);
            ((uint4*)(keys + (long long)column * HEAD_DIM))[lane] = packed;
            ((uint4*)(values + (long long)column * HEAD_DIM))[lane] = new_value;
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (base + d * SLOTS + slot == column) {
                    key[d] = packed;
                    value[d] = new_value;
                }
            }
        }
        __syncwarp();
        float score[DEPTH][GROUP];
        uint4 v_now[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            float k[8];
            unpack(key[d], k);
            v_now[d] = value[d];
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float dot = 0.f;
#pragma unroll
                for (int j = 0; j < 8; j++) dot += q[g][j] * k[j];
                score[d][g] = dot;
            }
        }
        load(keys, values, base + SLOTS * DEPTH, end, column, slot, lane, key, value);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
#pragma unroll
                for (int step = LANES / 2; step; step /= 2)
                    score[d][g] += __shfl_xor_sync(0xffffffff, score[d][g], step);
                if (base + d * SLOTS + slot >= end) score[d][g] = MINUS_INFINITY;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float top = largest[g];
#pragma unroll
            for (int d = 0; d < DEPTH; d++) top = fmaxf(top, score[d][g]);
            if (top == MINUS_INFINITY) continue;
            const float shrink = exp2f(largest[g] - top);
            largest[g] = top;
            total[g] *= shrink;
#pragma unroll
            for (int j = 0; j < 8; j++) sum[g][j] *= shrink;
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const float weight = exp2f(score[d][g] - top);
                float v[8];
                unpack(v_now[d], v);
                total[g] += weight;
#pragma unroll
                for (int j = 0; j < 8; j++) sum[g][j] += weight * v[j];
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        join_lanes(largest[g], total[g], sum[g]);
        if (threadIdx.x % 32 >= LANES) continue;
        float* of_warp = shared[threadIdx.x / 32][g];
#pragma unroll
        for (int j = 0; j < 8; j++) of_warp[lane * 8 + j] = sum[g][j];
        if (lane == 0) {
            of_warp[HEAD_DIM] = largest[g];
            of_warp[HEAD_DIM + 1] = total[g];
        }
    }
    __syncthreads();
    if (clustered && split) cluster_wait();  // the first block's inbox is open
    float* joined = partials + (((long long)row * kv_heads + kv_head) * splits) * GROUP * PARTIAL;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 4; i += THREADS) {
        const int g = i / (HEAD_DIM / 4), channel = i % (HEAD_DIM / 4) * 4;
        Joined all;
        all.add(shared[0][g], THREADS / 32, GROUP * PARTIAL, channel);  // there is a column in every share
        if (clustered && split) {
            inbox.send(&sent[split - 1][g][channel], all.result, 0);
            if (channel == 0) inbox.send(&sent[split - 1][g][HEAD_DIM], {all.top, all.weights, 0.f, 0.f}, 0);
            continue;
        }
        if (senders) {
            inbox.wait();
            all.add(sent[0][g], senders, GROUP * PARTIAL, channel);
        }
        if (clustered || shares == 1) {
            write_output(out, (long long)(row * heads + kv_head * GROUP) * HEAD_DIM + 4 * i, all.weights, all.result);
            continue;
        }
        float* share_of = joined + ((long long)split * GROUP + g) * PARTIAL;
        __stcg((float4*)(share_of + channel), make_float4(all.result[0], all.result[1], all.result[2], all.result[3]));
        if (channel == 0) __stcg((float2*)(share_of + HEAD_DIM), make_float2(all.top, all.weights));
    }
    if (clustered || shares == 1) return;
    __syncthreads();
    u32* arrived = arrivals + row * kv_heads + kv_head;
    if (threadIdx.x == 0) last_to_finish = arrive(arrived) + 1 == shares;
    __syncthreads();
    if (!last_to_finish) return;
    for (int i = threadIdx.x; i < GROUP * shares; i += THREADS) {
        const float* share_of = joined + ((i % shares) * GROUP + i / shares) * PARTIAL;
        const float2 both = __ldcg((const float2*)(share_of + HEAD_DIM));
        tops[i / shares][i % shares] = both.x;
        sums[i / shares][i % shares] = both.y;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 4; i += THREADS) {
        const int g = i / (HEAD_DIM / 4), channel = i % (HEAD_DIM / 4) * 4;
        float top = MINUS_INFINITY, weights = 0.f, result[4] = {};
        for (int s = 0; s < shares; s++) top = fmaxf(top, tops[g][s]);
#pragma unroll 8
        for (int s = 0; s < shares; s++) {
            const float4 part = __ldcg((const float4*)(joined + (s * GROUP + g) * PARTIAL + channel));
            const float values[4] = {part.x, part.y, part.z, part.w};
            add_share(values, exp2f(tops[g][s] - top), sums[g][s], weights, result);
        }
        write_output(out, (long long)(row * heads + kv_head * GROUP) * HEAD_DIM + 4 * i, weights, result);
    }
    if (threadIdx.x == 0) *arrived = 0;
}
