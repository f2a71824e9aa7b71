// Product with a nested weight, and its dequantisation. device.py explains the storage, cuda.py the design.
//
// Compile-time choices (-D): BITS 2..8; ROWS rows of x at most: 1, 2, 4 or 8; BFLOAT 0 or 1; PROLOGUE 0 none, 1 RMSNorm
// of x, 2 silu(gate) * up; GROUPED 0 or 1 (a table for each group_size columns, else for each row); STAGES steps of
// weights that a warp has under way; RAGGED 0 or 1 (columns that STEP does not divide); ONCE 1 or 0 (a warp's columns of x
// stay in registers). Short kernels wait for their own instructions, so what a shape does not need is left out.
// Nothing is included: NVRTC comes without CUDA's headers.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int TILE = 16;   // rows of the weight that a warp works on: those of one mma
constexpr int UNIT = 128;  // columns that four mma take: 32 for each of the four lanes that share a row
constexpr int STEP = 256;  // columns between two looks at the memory queue
constexpr int PLANES = BITS - 2;  // stored one by one; the first two are stored together, as pairs
constexpr int PAIR_BYTES = TILE * STEP / 4;
constexpr int PLANE_BYTES = TILE * STEP / 8;
constexpr int STEP_BYTES = PAIR_BYTES + PLANES * PLANE_BYTES;
constexpr int DIGITS = 2;                    // of an input: columns of the mma
constexpr int NT = (ROWS * DIGITS + 7) / 8;  // mma of 8 columns
constexpr int BASE = BITS == 4 ? 128 : 256;  // of a table's digits
constexpr bool REGISTER_TABLE = BITS <= 4;
constexpr int TABLE_BYTES = 2 << BITS;  // of a row (and group)
constexpr int MAX_THREADS = 512;
constexpr int MIN_BLOCKS = BITS <= 4 && ROWS <= 4 ? 2 : 1;  // on a processor: this kernel's and the next one's

__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
    return d;
}
__device__ __forceinline__ u32 pick(u32 a, u32 b, u32 mask) {  // bits of a where mask is set, else of b
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
    return d;
}
__device__ __forceinline__ u32 pick_inverted(u32 a, u32 b, u32 mask) {  // the same of ~b
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xB1;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
    return d;
}
__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy16(void* to, const void* from) {  // asynchronous, past L1
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy8(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_copies() {  // until at most so many groups are under way
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float to_float(u16 h) {
#if BFLOAT
    return __uint_as_float(u32(h) << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#endif
}
__device__ __forceinline__ u16 from_float(float f) {
    u16 h;
#if BFLOAT
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
#endif
    return h;
}

// ---------------------------------------------------------------------------------------------------- stored weights
struct Weight {
    const u32* packed;  // planes 0 and 1 of all tiles, then plane 2, ...
    const u8* tables;   // [tiles, groups, TILE, TABLE_BYTES]
    int tiles, in_features, group_size, groups;
};

struct Unit {  // one lane's 32 columns of rows g and g + 8
    uint4 pairs;
    uint2 plane[PLANES > 0 ? PLANES : 1];
};
typedef u32 Table[2][TABLE_BYTES / 4];  // of rows g and g + 8

__device__ __forceinline__ void load_table(Table& table, const u8* rows, int g) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        #pragma unroll
        for (int i = 0; i < TABLE_BYTES / 4; i += 2) {
            uint2 pair = *reinterpret_cast<const uint2*>(rows + (g + 8 * half) * TABLE_BYTES + 4 * i);
            table[half][i] = pair.x;
            table[half][i + 1] = pair.y;
        }
    }
}
__device__ __forceinline__ const u8* group_tables(const Weight& w, int tile, int unit, int t) {
    int group = GROUPED ? min(unit * UNIT + 32 * t, w.in_features - 32) / w.group_size : 0;
    return w.tables + size_t(tile * w.groups + group) * (TILE * TABLE_BYTES);
}
// Lanes of a quad that have columns in this unit.
__device__ __forceinline__ int owners(int in_features, int unit) { return max(0, min(4, in_features / 32 - unit * 4)); }

// Where a warp's copies come from: bytes of the pairs and of plane 2, for this lane.
struct Source {
    const u8 *pairs, *planes;
    size_t plane_bytes;  // from one plane to the next
};

// A step into shared memory: [unit][lane] pairs, then [unit][lane] of each plane. Lanes without columns get nothing: their
// inputs are zero, whatever is there.
__device__ __forceinline__ void copy_step(u8* to, const Source& from, u32 offset, int in_features, int step, int lane) {
    if (!RAGGED || step * STEP + STEP <= in_features) {
        copy16(to + lane * 16, from.pairs + offset);
        copy16(to + 512 + lane * 16, from.pairs + offset + 512);
        #pragma unroll
        for (int j = 0; j < PLANES; j++)
            copy16(to + PAIR_BYTES + j * PLANE_BYTES + lane * 16, from.planes + offset / 2 + j * from.plane_bytes);
    } else {
        for (int u = 0; u < 2; u++) {
            int lanes = owners(in_features, 2 * step + u), slot = (lane >> 2) * lanes + (lane & 3) - lane;
            if ((lane & 3) >= lanes) continue;
            copy16(to + u * 512 + lane * 16, from.pairs + offset + u * 512 + slot * 16);
            #pragma unroll
            for (int j = 0; j < PLANES; j++)
                copy8(to + PAIR_BYTES + j * PLANE_BYTES + u * 256 + lane * 8,
                      from.planes + offset / 2 + j * from.plane_bytes + u * 256 + slot * 8 - lane * 8);
        }
    }
}
__device__ __forceinline__ Unit read_unit(const u8* from, int u, int lane) {
    Unit x;
    x.pairs = *reinterpret_cast<const uint4*>(from + u * 512 + lane * 16);
    #pragma unroll
    for (int j = 0; j < PLANES; j++)
        x.plane[j] = *reinterpret_cast<const uint2*>(from + PAIR_BYTES + j * PLANE_BYTES + u * 256 + lane * 8);
    return x;
}

// Eight weights of row g + 8 * half: columns 8 * part .. of the lane's 32. Nibble n of the selector is column 8 * part + n.
__device__ __forceinline__ u32 low_planes(const Unit& x, int half, int part) {
    u32 word = half ? (part < 2 ? x.pairs.z : x.pairs.w) : (part < 2 ? x.pairs.x : x.pairs.y);
    return part & 1 ? word >> 2 : word;
}
__device__ __forceinline__ u32 plane_word(const Unit& x, int j, int half) { return half ? x.plane[j].y : x.plane[j].x; }
__device__ __forceinline__ u32 third_plane(const Unit& x, int half, int part) {  // at bit 2 of each nibble
    u32 word = plane_word(x, 0, half);
    return part == 0 ? word : part == 1 ? word >> 1 : part == 2 ? word << 1 : word << 2;
}
__device__ __forceinline__ u32 upper_plane(const Unit& x, int j, int half, int part) {  // at bit 3 of each nibble
    return plane_word(x, j, half) << part;
}

struct Digits {  // high and low digits of eight weights, one byte each; the second of two halves is all of one table half
    u32 high[2][2], low[2][2];
};

__device__ __forceinline__ Digits lookup(const Unit& x, const Table& table, const u8* memory, int half, int part) {
    Digits d;
    const u32* row = table[half];
#if BITS == 2
    u32 s = low_planes(x, half, part) & 0x33333333u;
    #pragma unroll
    for (int k = 0; k < 2; k++, s >>= 16) {
        d.high[0][k] = permute(row[0], row[0], s);
        d.low[0][k] = permute(row[1], row[1], s);
    }
#elif BITS == 3
    u32 s = pick(low_planes(x, half, part), third_plane(x, half, part), 0x33333333u) & 0x77777777u;
    #pragma unroll
    for (int k = 0; k < 2; k++, s >>= 16) {
        d.high[0][k] = permute(row[0], row[1], s);
        d.low[0][k] = permute(row[2], row[3], s);
    }
#elif BITS == 4
    // A selector's bit 3 replicates the sign of the byte: digits have 7 bits, so it yields zero.
    u32 three = pick(low_planes(x, half, part), third_plane(x, half, part), 0x33333333u);
    u32 fourth = upper_plane(x, 1, half, part);
    u32 clear = pick(three, fourth, 0x77777777u), set = pick_inverted(three, fourth, 0x77777777u);
    #pragma unroll
    for (int k = 0; k < 2; k++, clear >>= 16, set >>= 16) {
        d.high[0][k] = permute(row[0], row[1], clear);
        d.high[1][k] = permute(row[2], row[3], set);
        d.low[0][k] = permute(row[4], row[5], clear);
        d.low[1][k] = permute(row[6], row[7], set);
    }
#else
    u32 three = pick(low_planes(x, half, part), third_plane(x, half, part), 0x33333333u);
    u32 nibble = pick(three, upper_plane(x, 1, half, part), 0x77777777u), upper = 0;
    #pragma unroll
    for (int j = 2; j < PLANES; j++) upper |= (upper_plane(x, j, half, part) & 0x88888888u) >> (5 - j);
    u32 even = pick(nibble, upper << 4, 0x0f0f0f0fu), odd = pick(nibble >> 4, upper, 0x0f0f0f0fu);
    const u16* entries = reinterpret_cast<const u16*>(memory);
    #pragma unroll
    for (int k = 0; k < 2; k++, even >>= 16, odd >>= 16) {
        u32 w0 = entries[even & 0xffu], w1 = entries[odd & 0xffu];
        u32 w2 = entries[(even >> 8) & 0xffu], w3 = entries[(odd >> 8) & 0xffu];
        u32 a = permute(w0, w1, 0x5140u), b = permute(w2, w3, 0x5140u);
        d.low[0][k] = permute(a, b, 0x5410u);
        d.high[0][k] = permute(a, b, 0x7632u);
    }
#endif
    return d;
}

// -------------------------------------------------------------------------------------------------------- the product
struct Input {
    const u16 *x, *norm_weight;  // at this lane's first column
    int rows, in_features;
    int left;  // columns from this lane's first to the end
};

__device__ __forceinline__ float element(const uint4& raw, int i) {
    u32 word = i < 2 ? raw.x : i < 4 ? raw.y : i < 6 ? raw.z : raw.w;
    return to_float(u16(i & 1 ? word >> 16 : word));
}
constexpr int CHUNK = 2;  // steps of x in registers at once
struct Raw {              // eight inputs of each
    uint4 x[CHUNK], up[PROLOGUE == 2 ? CHUNK : 1];
};
__device__ __forceinline__ uint4 load8(const u16* p, bool there) {
    uint4 v;
    asm volatile("{ .reg .pred there; setp.ne.s32 there, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
                 "  @there ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"(int(there)) : "memory");
    return v;
}
// Row m of x from `ahead` columns after this lane's first, and from `hop` columns further.
__device__ __forceinline__ void fetch(Raw& raw, const Input& in, int m, int ahead, int hop) {
    const u16* row = in.x + size_t(m) * in.in_features * (PROLOGUE == 2 ? 2 : 1) + ahead;
    #pragma unroll
    for (int c = 0; c < CHUNK; c++) {
        raw.x[c] = load8(row + c * hop, ahead + c * hop < in.left);
        if (PROLOGUE == 2) raw.up[c] = load8(row + in.in_features + c * hop, ahead + c * hop < in.left);
    }
}
// Inputs as the product sees them, but for the norm's factor, which the end applies. Adds their squares before the norm's
// weight.
__device__ __forceinline__ void decode(float (&v)[8], float& squares, const Raw& raw, int c, const Input& in, int ahead) {
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = element(raw.x[c], i);
#if PROLOGUE == 1
    uint4 scale = load8(in.norm_weight + ahead, ahead < in.left);
    #pragma unroll
    for (int i = 0; i < 8; i++) squares += v[i] * v[i], v[i] *= element(scale, i);
#elif PROLOGUE == 2
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fdividef(v[i], 1.0f + __expf(-v[i])) * element(raw.up[c], i);
#endif
}
__device__ __forceinline__ float warp_sum(float v) {
    #pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

struct Staged {  // of each row of x and each warp's columns
    float step[ROWS][MAX_THREADS / 32];  // x = step * integer
    float sum[ROWS][MAX_THREADS / 32];
    float squares[ROWS][MAX_THREADS / 32];
};

// 1.5 * 2^23 + 0x8080: adding it leaves the rounded integer in the low 16 bits, its two base-256 digits 128 too large.
constexpr float ROUNDER = 12582912.0f + 32896.0f;
constexpr float LARGEST_INTEGER = 32600.0f;

// A split's columns of x (steps split, split + splits, ...) as balanced base-256 digits of integers, the largest of which is
// LARGEST_INTEGER: digits[(m * DIGITS + d) * stride + column]; `digits` is at this lane's first column. Not finite x makes
// outputs not finite. Teams share the rows.
template <typename F>
__device__ __forceinline__ void stage(u8* digits, int stride, Staged& s, const Input& in, int split, int splits, int team,
                                      int teams, int lane, F&& once_loads_are_out) {
    const int hop = splits * STEP, padded = in.left + 8 * lane;  // from the step's first column
    Raw next;
    if (ROWS == 1) fetch(next, in, 0, 0, hop);
    else if (team < in.rows) fetch(next, in, team, 0, hop);
    once_loads_are_out();
    auto row = [&](int m) {
        Raw raw = next;
        if (ROWS > 1 && m + teams < in.rows) fetch(next, in, m + teams, 0, hop);
        float v[CHUNK][8], squares = 0, unused = 0;
        int sums[DIGITS] = {};
        u32 largest = 0;  // bits of the largest magnitude; a NaN's are larger than any number's
        auto look = [&](int ahead) {
            #pragma unroll
            for (int c = 0; c < CHUNK; c++) {
                decode(v[c], squares, raw, c, in, ahead + c * hop);
                #pragma unroll
                for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(v[c][i]) & 0x7fffffffu);
            }
        };
        look(0);
        if (!ONCE) {
            #pragma unroll 1
            for (int ahead = CHUNK * hop; ahead < padded; ahead += CHUNK * hop) {
                fetch(raw, in, m, ahead, hop);
                look(ahead);
            }
        }
        const float magnitude = __uint_as_float(__reduce_max_sync(~0u, largest));
        const float inverse = magnitude < 1e-30f ? 0.0f : __fdividef(LARGEST_INTEGER, magnitude);
        auto write = [&](int ahead) {
            #pragma unroll
            for (int c = 0; c < CHUNK; c++) {
                if (ahead + c * hop >= padded) continue;
                u32 byte[DIGITS][2];
                #pragma unroll
                for (int q = 0; q < 2; q++) {
                    u32 n[4];
                    #pragma unroll
                    for (int i = 0; i < 4; i++) n[i] = __float_as_uint(fmaf(v[c][4 * q + i], inverse, ROUNDER));
                    u32 a = permute(n[0], n[1], 0x5140u), b = permute(n[2], n[3], 0x5140u);
                    byte[0][q] = permute(a, b, 0x5410u) ^ 0x80808080u;
                    byte[1][q] = permute(a, b, 0x7632u) ^ 0x80808080u;
                    #pragma unroll
                    for (int d = 0; d < DIGITS; d++) sums[d] = __dp4a(int(byte[d][q]), 0x01010101, sums[d]);
                }
                #pragma unroll
                for (int d = 0; d < DIGITS; d++)
                    *reinterpret_cast<uint2*>(digits + (m * DIGITS + d) * stride + ahead + c * hop) =
                        make_uint2(byte[d][0], byte[d][1]);
            }
        };
        if (ONCE) {
            write(0);
        } else {
            #pragma unroll 1
            for (int ahead = 0; ahead < padded; ahead += CHUNK * hop) {
                fetch(raw, in, m, ahead, hop);
                #pragma unroll
                for (int c = 0; c < CHUNK; c++) decode(v[c], unused, raw, c, in, ahead + c * hop);
                write(ahead);
            }
        }
        const int sum = __reduce_add_sync(~0u, sums[0] + 256 * sums[1]);
        if (PROLOGUE == 1) squares = warp_sum(squares);
        if (lane == 0) {
            float step = magnitude * (1.0f / LARGEST_INTEGER);
            s.step[m][split] = step, s.sum[m][split] = step * float(sum), s.squares[m][split] = squares;
        }
    };
    if (ROWS == 1) {
        if (team == 0) row(0);
    } else {
        #pragma unroll 1
        for (int m = team; m < in.rows; m += teams) row(m);
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
nested_matmul(const u16* x, const u32* packed, const u8* tables, const float2* scales, u16* out, const u16* norm_weight,
              const u16* residual, const u16* bias, float norm_eps, int rows, int out_features, int in_features,
              int group_size, int groups, int splits, int early, int late) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ Staged staged;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), warps = blockDim.x >> 5;
    const int split = warp % splits, team = warp / splits, teams = warps / splits;
    const int steps = (in_features + STEP - 1) / STEP, tiles = (out_features + TILE - 1) / TILE, stride = steps * STEP + 16;
    const int first_tile = u32(blockIdx.x) * u32(tiles) / gridDim.x;
    const int my_tiles = (u32(blockIdx.x) + 1) * u32(tiles) / gridDim.x - first_tile;
    u8* ring = shared + warp * (STAGES * STEP_BYTES);
    u8* const ring_end = ring + STAGES * STEP_BYTES;
    u8* digits = shared + warps * (STAGES * STEP_BYTES);
    float* partial = reinterpret_cast<float*>(digits + ROWS * DIGITS * stride);  // [tile][split][ROWS][TILE]
    float2* block_scales = reinterpret_cast<float2*>(partial + ((tiles - 1) / gridDim.x + 1) * splits * ROWS * TILE);
    u8* block_tables = reinterpret_cast<u8*>(block_scales + ((tiles - 1) / gridDim.x + 1) * TILE);

    // Weights do not depend on earlier kernels: ask for them before waiting for those.
    const u8* bytes = reinterpret_cast<const u8*>(scales + first_tile * TILE);
    for (int i = threadIdx.x * 16; i < my_tiles * TILE * 8; i += blockDim.x * 16)
        copy16(reinterpret_cast<u8*>(block_scales) + i, bytes + i);
    bytes = tables + size_t(first_tile) * TILE * TABLE_BYTES;
    if (!GROUPED)
        for (int i = threadIdx.x * 16; i < my_tiles * TILE * TABLE_BYTES; i += blockDim.x * 16)
            copy16(block_tables + i, bytes + i);
    commit_copies();

    const Weight weight = {packed, tables, tiles, in_features, group_size, groups};
    Source source;
    source.plane_bytes = size_t(tiles) * in_features * 2;
    source.pairs = reinterpret_cast<const u8*>(packed) + size_t(first_tile + team) * in_features * 4 + lane * 16;
    source.planes = reinterpret_cast<const u8*>(packed) + 2 * source.plane_bytes +
                    size_t(first_tile + team) * in_features * 2 + lane * 16;
    int load_tile = team, load_step = split;
    u32 offset = split * PAIR_BYTES, tile_offset = 0;
    u8* load_slot = ring;
    auto load_next = [&] {
        if (load_tile < my_tiles && load_step < steps) copy_step(load_slot, source, offset, in_features, load_step, lane);
        commit_copies();
        load_slot = load_slot + STEP_BYTES == ring_end ? ring : load_slot + STEP_BYTES;
        load_step += splits, offset += splits * PAIR_BYTES;
        if (load_step >= steps) {
            load_step = split, load_tile += teams;
            tile_offset += teams * in_features * 4, offset = tile_offset + split * PAIR_BYTES;
        }
    };
    #pragma unroll 1
    for (int i = 0; i < early; i++) load_next();
    const int column = split * STEP + 8 * lane;
    Input input = {x + column, norm_weight + column, rows, in_features, in_features - column};
    u8* my_column = digits + column;
    asm volatile("" : "+l"(input.x), "+r"(input.left), "+l"(my_column));  // computed now, not after the wait
#if PROLOGUE == 1
    if (team == 0 && lane % 8 == 0)
        for (int k = split * STEP + 8 * lane; k < in_features; k += splits * STEP)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(norm_weight + k));
#endif
#if __CUDA_ARCH__ >= 900
    if (!late) asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (my_tiles == 0) return;
    stage(my_column, stride, staged, input, split, splits, team, teams, lane, [&] {
        #pragma unroll 1
        for (int i = early; i < STAGES; i++) load_next();
    });
#if __CUDA_ARCH__ >= 900
    if (late) asm volatile("griddepcontrol.launch_dependents;");
#endif
    wait_copies<STAGES>();
    __syncthreads();  // tables and digits are there

    const u8* my_digits[NT];  // the row of digits that this lane feeds to column g of each mma
    #pragma unroll
    for (int n = 0; n < NT; n++) {
        int column = (n * 8 + g) % (ROWS * DIGITS);  // m * DIGITS + d; spare columns of the mma repeat others
        my_digits[n] = digits + column * stride + 32 * t;
    }
    const u8* slot = ring;
    #pragma unroll 1
    for (int tile = team; tile < my_tiles; tile += teams) {
        Table table;
        const u8* memory = block_tables + tile * TILE * TABLE_BYTES;
        if (REGISTER_TABLE && !GROUPED) load_table(table, memory, g);
        int high[NT][4] = {}, low[NT][4] = {};
        #pragma unroll 1
        for (int step = split; step < steps; step += splits) {
            wait_copies<STAGES - 1>();
            __syncwarp();
            #pragma unroll
            for (int u = 0; u < 2; u++) {
                const Unit now = read_unit(slot, u, lane);
                if (u == 1) {
                    slot = slot + STEP_BYTES == ring_end ? ring : slot + STEP_BYTES;
                    __syncwarp();
                    load_next();
                }
                if (GROUPED) memory = group_tables(weight, first_tile + tile, 2 * step + u, t);
                if (REGISTER_TABLE && GROUPED) load_table(table, memory, g);
                #pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    uint4 b[NT];
                    #pragma unroll
                    for (int n = 0; n < NT; n++)
                        b[n] = *reinterpret_cast<const uint4*>(my_digits[n] + step * STEP + u * UNIT + 16 * pair);
                    #pragma unroll
                    for (int k = 0; k < 2; k++) {
                        Digits r0 = lookup(now, table, memory + g * TABLE_BYTES, 0, 2 * pair + k);
                        Digits r1 = lookup(now, table, memory + (g + 8) * TABLE_BYTES, 1, 2 * pair + k);
                        #pragma unroll
                        for (int n = 0; n < NT; n++) {
                            u32 b0 = k ? b[n].z : b[n].x, b1 = k ? b[n].w : b[n].y;
                            mma(high[n], r0.high[0][0], r1.high[0][0], r0.high[0][1], r1.high[0][1], b0, b1);
                            mma(low[n], r0.low[0][0], r1.low[0][0], r0.low[0][1], r1.low[0][1], b0, b1);
#if BITS == 4  // of the two table halves one is zero: adding them here is cheaper than blending
                            mma(high[n], r0.high[1][0], r1.high[1][0], r0.high[1][1], r1.high[1][1], b0, b1);
                            mma(low[n], r0.low[1][0], r1.low[1][0], r0.low[1][1], r1.low[1][1], b0, b1);
#endif
                        }
                    }
                }
            }
        }
        float* mine = partial + (tile * splits + split) * ROWS * TILE;
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float even = float(BASE) * float(high[n][2 * half]) + float(low[n][2 * half]);
                float odd = float(BASE) * float(high[n][2 * half + 1]) + float(low[n][2 * half + 1]);
                int m = n * 4 + t;
                if (m < ROWS) mine[m * TILE + g + 8 * half] = staged.step[m][split] * (even + 256.0f * odd);
            }
        }
    }
    __syncthreads();

    // Four lanes for an output, each with a quarter of the splits; i counts lanes, always of whole warps.
    #pragma unroll 1
    for (int i = threadIdx.x; i < my_tiles * ROWS * TILE * 4; i += blockDim.x) {
        const int r = i / 4 % TILE, m = i / (4 * TILE) % ROWS, local = i / (4 * TILE * ROWS);
        float product = 0, sum = 0, squares = 0;
        #pragma unroll 1
        for (int k = i % 4; k < splits; k += 4) {
            product += partial[((local * splits + k) * ROWS + m) * TILE + r];
            sum += staged.sum[m][k];
            if (PROLOGUE == 1) squares += staged.squares[m][k];
        }
        const float2 scale = block_scales[local * TILE + r];
        float value = scale.x * product + scale.y * sum;
        #pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            value += __shfl_xor_sync(~0u, value, d);
            if (PROLOGUE == 1) squares += __shfl_xor_sync(~0u, squares, d);
        }
        const int row = (first_tile + local) * TILE + r;
        if (i % 4 || m >= rows || row >= out_features) continue;
        if (PROLOGUE == 1) value *= rsqrtf(squares / in_features + norm_eps);
        if (bias) value += to_float(bias[row]);
        const size_t at = size_t(m) * out_features + row;
        if (residual) value += to_float(residual[at]);
        out[at] = from_float(value);
    }
}

// Half-precision tiles for the tensor cores: rows first_row .. of the weight into out [rows, in_features]. One warp a unit.
extern "C" __global__ void dequantize(const u32* packed, const u8* tables, const float2* scales, u16* out,
                                      int out_features, int in_features, int group_size, int groups, int first_tile,
                                      int last_row) {
    const Weight weight = {packed, tables, (out_features + TILE - 1) / TILE, in_features, group_size, groups};
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int unit = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), tile = first_tile + blockIdx.y;
    if (unit * UNIT + 32 * t >= in_features) return;
    const int slot = g * owners(in_features, unit) + t;
    const size_t plane_words = size_t(weight.tiles) * in_features / 2;
    Unit now;
    now.pairs = *reinterpret_cast<const uint4*>(packed + size_t(tile) * in_features + unit * UNIT + slot * 4);
    #pragma unroll
    for (int j = 0; j < PLANES; j++)
        now.plane[j] = *reinterpret_cast<const uint2*>(packed + (2 + j) * plane_words + size_t(tile) * (in_features / 2) +
                                                       unit * (UNIT / 2) + slot * 2);
    Table table;
    const u8* memory = group_tables(weight, tile, unit, t);
    if (REGISTER_TABLE) load_table(table, memory, g);
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = tile * TILE + g + 8 * half;
        if (row >= last_row) continue;
        float2 scale = scales[row];
        u16* line = out + size_t(row - first_tile * TILE) * in_features + unit * UNIT + 32 * t;
        #pragma unroll
        for (int part = 0; part < 4; part++) {
            Digits d = lookup(now, table, memory + (g + 8 * half) * TABLE_BYTES, half, part);
            u32 words[4];
            #pragma unroll
            for (int i = 0; i < 8; i++) {
                u32 h = d.high[0][i / 4], l = d.low[0][i / 4];
#if BITS == 4
                h |= d.high[1][i / 4], l |= d.low[1][i / 4];
#endif
                int shift = 8 * (i % 4);
                float value = scale.x * float(((h >> shift) & 0xffu) * BASE + ((l >> shift) & 0xffu)) + scale.y;
                u32 bits = from_float(value);
                words[i / 2] = i % 2 ? words[i / 2] | bits << 16 : bits;
            }
            *reinterpret_cast<uint4*>(line + 8 * part) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}
