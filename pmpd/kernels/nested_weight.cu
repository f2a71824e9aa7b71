// A nested weight: copied into shared memory, its tables looked up eight weights at a time. Followed by nested_input.cu and
// nested_matmul.cu, which are one program with this. device.py explains the storage, cuda.py the design.
//
// Compile-time choices (-D): BITS 2..8; ROWS rows of x at most: 1, 2, 4 or 8; BFLOAT 0 or 1; NORM 0 or 1 (RMSNorm of
// x); GATED 0 or 1 (rows are eight gates and eight ups in turns, the result is silu(gate) * up); GROUPED 0 or 1 (a table
// for each group_size columns, else for each row); STAGES steps of weights that a warp has under way; RAGGED 0 or 1
// (columns that STEP does not divide); ONCE 1 or 0 (a warp's columns of x stay in registers). Short kernels wait for their own instructions, so what a shape does not need is left out.
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
constexpr bool REGISTER_TABLE = BITS <= 5;
constexpr int EIGHTHS = REGISTER_TABLE && BITS > 3 ? 1 << (BITS - 3) : 1;  // tables of eight entries in one
constexpr int BASE = EIGHTHS > 1 ? 128 : 256;                              // of a table's digits
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

struct Digits {  // high and low digits of eight weights, one byte each; of several tables all but one yield zeros
    u32 high[EIGHTHS][2], low[EIGHTHS][2];
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
#elif BITS <= 5
    // A selector's bit 3 replicates the sign of the byte: digits have 7 bits, so it yields zero. It is set in the tables
    // of eight that an entry is not in.
    u32 three = pick(low_planes(x, half, part), third_plane(x, half, part), 0x33333333u);
    u32 fourth = upper_plane(x, 1, half, part);
#if BITS == 5
    u32 fifth = upper_plane(x, 2, half, part);
#endif
    #pragma unroll
    for (int e = 0; e < EIGHTHS; e++) {
#if BITS == 5
        u32 elsewhere = (e & 1 ? ~fourth : fourth) | (e & 2 ? ~fifth : fifth);
        u32 s = pick(three, elsewhere, 0x77777777u);
#else
        u32 s = e ? pick_inverted(three, fourth, 0x77777777u) : pick(three, fourth, 0x77777777u);
#endif
        #pragma unroll
        for (int k = 0; k < 2; k++, s >>= 16) {
            d.high[e][k] = permute(row[2 * e], row[2 * e + 1], s);
            d.low[e][k] = permute(row[2 * EIGHTHS + 2 * e], row[2 * EIGHTHS + 2 * e + 1], s);
        }
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

