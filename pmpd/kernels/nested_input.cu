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
// Eight inputs as the product sees them, but for the norm's factor, which the end applies.
struct Inputs {
#if NORM
    float v[8];

    // Adds the squares before the norm's weight.
    __device__ __forceinline__ void take(const uint4& raw, const Input& in, int ahead, float& squares) {
        uint4 scale = load8(in.norm_weight + ahead, ahead < in.left);
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = element(raw, i), squares += v[i] * v[i], v[i] *= element(scale, i);
    }
    __device__ __forceinline__ float operator[](int i) const { return v[i]; }
#else
    uint4 raw;

    __device__ __forceinline__ void take(const uint4& them, const Input&, int, float&) { raw = them; }
    __device__ __forceinline__ float operator[](int i) const { return element(raw, i); }
#endif
};
// The largest magnitude of inputs; of a NaN and anything a NaN.
struct Largest {
    u32 bits = 0;  // of a float if NORM (a NaN's are larger than any number's), else of two values of x's type

    __device__ __forceinline__ void see(const Inputs& x) {
#if NORM
        #pragma unroll
        for (int i = 0; i < 8; i++) bits = max(bits, __float_as_uint(x[i]) & 0x7fffffffu);
#else
        see_two(x.raw.x), see_two(x.raw.y), see_two(x.raw.z), see_two(x.raw.w);
#endif
    }
    __device__ __forceinline__ void see_two(u32 two) {
#if BFLOAT
        asm("{ .reg .b32 magnitudes; abs.bf16x2 magnitudes, %1; max.NaN.bf16x2 %0, %0, magnitudes; }" : "+r"(bits) : "r"(two));
#else
        asm("{ .reg .b32 magnitudes; abs.f16x2 magnitudes, %1; max.NaN.f16x2 %0, %0, magnitudes; }" : "+r"(bits) : "r"(two));
#endif
    }
    __device__ __forceinline__ float of_warp() const {
        const u32 mine = NORM ? bits : max(__float_as_uint(to_float(u16(bits))), __float_as_uint(to_float(u16(bits >> 16))));
        return __uint_as_float(__reduce_max_sync(~0u, mine));
    }
};
__device__ __forceinline__ float warp_sum(float v) {
    #pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

struct Staged {  // of each row of x and each of a block's splits
    float step[ROWS][MAX_THREADS / 32];  // x = step * integer
    float sum[ROWS][MAX_THREADS / 32];
    float squares[ROWS][MAX_THREADS / 32];
};

// A split's columns of x (the block's steps own, own + own_splits, ...) as balanced base-256 digits of integers, the largest of
// which is LARGEST_INTEGER, where the method wants them. Not finite x makes outputs not finite. Teams share the rows.
template <typename F>
__device__ __forceinline__ void stage(const ColumnsOut& out, Staged& s, const Input& in, int own, int own_splits, int team, int teams,
                                      int lane, F&& once_loads_are_out) {
    const int kept_hop = own_splits * STEP, hop = CLUSTER * kept_hop;  // columns from one step to the next: in shared memory; in x
    const int padded = in.left + 8 * lane;                             // from the step's first column
    Raw next;
    if (ROWS == 1) fetch(next, in, 0, 0, hop);
    else if (team < in.rows) fetch(next, in, team, 0, hop);
    once_loads_are_out();
    auto row = [&](int m) {
        Raw raw = next;
        if (ROWS > 1 && m + teams < in.rows) fetch(next, in, m + teams, 0, hop);
        Inputs v[CHUNK];
        float squares = 0, unused = 0;
        int sums[DIGITS] = {};
        Largest largest;
        auto look = [&](int ahead) {
            #pragma unroll
            for (int c = 0; c < CHUNK; c++) v[c].take(raw.x[c], in, ahead + c * hop, squares), largest.see(v[c]);
        };
        look(0);
        if (!ONCE) {
            #pragma unroll 1
            for (int ahead = CHUNK * hop; ahead < padded; ahead += CHUNK * hop) {
                fetch(raw, in, m, ahead, hop);
                look(ahead);
            }
        }
        const float magnitude = largest.of_warp();
        const float inverse = magnitude < 1e-30f ? 0.0f : __fdividef(LARGEST_INTEGER, magnitude);
        auto write = [&](int first) {
            #pragma unroll
            for (int c = 0; c < CHUNK; c++) {
                u32 n[8];
                #pragma unroll
                for (int i = 0; i < 8; i++) n[i] = __float_as_uint(fmaf(v[c][i], inverse, ROUNDER));
                out.put(m, (first + c) * kept_hop, (first + c) * hop < padded, n, sums);
            }
        };
        if (ONCE) {
            write(0);
        } else {
            #pragma unroll 1
            for (int first = 0; first * hop < padded; first += CHUNK) {
                fetch(raw, in, m, first * hop, hop);
                #pragma unroll
                for (int c = 0; c < CHUNK; c++) v[c].take(raw.x[c], in, (first + c) * hop, unused);
                write(first);
            }
        }
        const int sum = __reduce_add_sync(~0u, sums[0] + 256 * sums[1]);
        if (NORM) squares = warp_sum(squares);
        if (lane == 0) {
            float step = magnitude * (1.0f / LARGEST_INTEGER);
            s.step[m][own] = step, s.sum[m][own] = step * float(sum), s.squares[m][own] = squares;
        }
    };
    if (ROWS == 1) {
        if (team == 0) row(0);
    } else {
        #pragma unroll ROWS_AHEAD
        for (int m = team; m < in.rows; m += teams) row(m);
    }
}

