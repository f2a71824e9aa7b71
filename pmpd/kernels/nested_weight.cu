// A nested weight, copied into shared memory. After cluster.cu, the second part of a program whose method of multiplying is
// nested_lookup.cu or nested_planes.cu, followed by nested_input.cu, nested_matmul.cu and, with look-up, nested_decode.cu.
// device.py explains the storage, cuda.py the design.
//
// Compile-time choices (-D): BITS 2..8; ROWS rows of x at most: 1, 2, 4 or 8, by planes 1; BFLOAT 0 or 1; NORM 0 or 1 (RMSNorm
// of x); GATED 0 or 1 (rows are eight gates and eight ups in turns, the result is silu(gate) * up); GROUPED 0 or 1 (a table
// for each group_size columns, else for each row); TABLE_DIGITS bytes of a table's entry: 2, or 1 by look-up of 2 bits; SPREAD
// 0 or 1 (see nested_lookup.cu); STAGES steps of weights that a warp has under way, which are all of its own if WHOLE is 1;
// RAGGED 0 or 1 (columns that STEP does not divide); CHUNK steps of x that a warp has in registers at once, which are all of
// its own if ONCE is 1; MAX_THREADS of a block: 192, 256, 384 or 512; CLUSTER blocks that share tiles, 1 below compute
// capability 9.0; FIXED_BYTES of a block's shared memory, whose layout launch.py has.
// Short kernels wait for their own instructions, so what a shape does not need is left out.

constexpr int TILE = 16;   // rows of the weight that a warp works on: those of one mma
constexpr int UNIT = 128;  // columns that four mma take: 32 for each of the four lanes that share a row
constexpr int STEP = 256;  // columns between two looks at the memory queue
constexpr int PLANES = BITS - 2;  // stored one by one; the first two are stored together, as pairs
constexpr int PAIR_BYTES = TILE * STEP / 4;
constexpr int PLANE_BYTES = TILE * STEP / 8;
constexpr int STEP_BYTES = PAIR_BYTES + PLANES * PLANE_BYTES;
constexpr int DIGITS = 2;  // of an input
constexpr int BASE = BITS == 4 || BITS == 5 ? 128 : 256;  // of a table's digits
constexpr int TABLE_BYTES = TABLE_DIGITS << BITS;  // of a row (and group)

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
// Into shared memory, if there.
__device__ __forceinline__ void store4(u32 to, u32 v, bool there) {
    asm volatile("{ .reg .pred there; setp.ne.s32 there, %2, 0; @there st.shared.u32 [%0], %1; }"
                 ::"r"(to), "r"(v), "r"(int(there)) : "memory");
}
__device__ __forceinline__ void store8(u32 to, u32 v0, u32 v1, bool there) {
    asm volatile("{ .reg .pred there; setp.ne.s32 there, %3, 0; @there st.shared.v2.u32 [%0], {%1, %2}; }"
                 ::"r"(to), "r"(v0), "r"(v1), "r"(int(there)) : "memory");
}
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
// A kernel begins about when the one before it reads its x, which weights asked for at once would delay.
__device__ __forceinline__ void hold_back(u32 clocks) {
    u32 start, now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(start));
    do asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
    while (now - start < clocks);
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

struct Weight {
    const u32* packed;  // planes 0 and 1 of all tiles, then plane 2, ...
    const u8* tables;   // [tiles, groups, TILE, TABLE_BYTES]
    int tiles, in_features, group_size, groups;
};

struct Unit {  // one lane's 32 columns of rows g and g + 8
    uint4 pairs;
    uint2 plane[PLANES > 0 ? PLANES : 1];
};
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

// 1.5 * 2^23 + 0x80: adding it leaves the rounded integer, 128 too large, in the low 16 bits. So the upper byte is the upper of
// its two balanced base-256 digits, and the lower byte 128 more than the lower one, modulo 256.
constexpr float ROUNDER = 12582912.0f + 128.0f;
constexpr float LARGEST_INTEGER = 32600.0f;

// Low and high digits (signed bytes) of four such integers, and their sums added to `sums`.
__device__ __forceinline__ void four_digits(u32 (&byte)[DIGITS], u32 n0, u32 n1, u32 n2, u32 n3, int (&sums)[DIGITS]) {
    u32 a = permute(n0, n1, 0x5140u), b = permute(n2, n3, 0x5140u);
    byte[0] = permute(a, b, 0x5410u) ^ 0x80808080u;
    byte[1] = permute(a, b, 0x7632u);
    #pragma unroll
    for (int d = 0; d < DIGITS; d++) sums[d] = __dp4a(int(byte[d]), 0x01010101, sums[d]);
}
