// What comes before the product: the norm, and inputs as integers, which the method puts in its own order.

struct Input {
    const u16 *x, *norm_weight;  // at this lane's first column
    int rows, in_features;
    int left;  // columns from this lane's first to the end
};

__device__ __forceinline__ float element(const uint4& raw, int i) {
    u32 word = i < 2 ? raw.x : i < 4 ? raw.y : i < 6 ? raw.z : raw.w;
    return to_float(u16(i & 1 ? word >> 16 : word));
}
struct Raw {  // eight inputs of each of CHUNK steps
    uint4 x[CHUNK];
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
    const u16* row = in.x + size_t(m) * in.in_features + ahead;
    #pragma unroll
    for (int c = 0; c < CHUNK; c++) raw.x[c] = load8(row + c * hop, ahead + c * hop < in.left);
}
// Inputs as the product sees them, but for the norm's factor, which the end applies. Adds their squares before the norm's
// weight.
__device__ __forceinline__ void decode(float (&v)[8], float& squares, const Raw& raw, int c, const Input& in, int ahead) {
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = element(raw.x[c], i);
#if NORM
    uint4 scale = load8(in.norm_weight + ahead, ahead < in.left);
    #pragma unroll
    for (int i = 0; i < 8; i++) squares += v[i] * v[i], v[i] *= element(scale, i);
#endif
}
__device__ __forceinline__ float warp_sum(float v) {
    #pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

struct Staged {  // of each row of x and each warp's columns
    float step[ROWS][MAX_SPLITS];  // x = step * integer
    float sum[ROWS][MAX_SPLITS];
    float squares[ROWS][MAX_SPLITS];
};

// A split's columns of x (steps split, split + splits, ...) as balanced base-256 digits of integers, the largest of which is
// LARGEST_INTEGER, where the method wants them. Not finite x makes outputs not finite. Teams share the rows.
template <typename F>
__device__ __forceinline__ void stage(const ColumnsOut& out, Staged& s, const Input& in, int split, int splits, int team, int teams,
                                      int lane, F&& once_loads_are_out) {
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
                u32 n[8];
                #pragma unroll
                for (int i = 0; i < 8; i++) n[i] = __float_as_uint(fmaf(v[c][i], inverse, ROUNDER));
                out.put(m, ahead + c * hop, n, sums);
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
        if (NORM) squares = warp_sum(squares);
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

