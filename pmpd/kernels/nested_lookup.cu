// Multiplying by look-up: eight weights at a time are looked up as bytes, which the integer tensor cores multiply by digits
// of x: the high and low bytes of table entries, or, for several rows of x at 2 bits, entries that are one byte (the low one).
// Every precision, any number of rows of x, tables of groups.

static_assert(TABLE_DIGITS == 2 || BITS == 2, "more bits want more than a byte");
constexpr int NT = (ROWS * DIGITS + 7) / 8;  // mma of 8 columns
constexpr bool REGISTER_TABLE = BITS <= 5;
constexpr int EIGHTHS = REGISTER_TABLE && BITS > 3 ? 1 << (BITS - 3) : 1;  // tables of eight entries in one
constexpr int SHARED_TABLE_BYTES = GROUPED ? 0 : TABLE_BYTES;              // of a row
// Lanes that look entries up in one table meet on its banks. So where tables are not in registers a team has those of its tile
// spread if SPREAD: two bytes a lane, [row half][code][lane], of which two lanes share a bank and others none.
static_assert(!SPREAD || (!REGISTER_TABLE && !GROUPED), "other tables are not in shared memory");
constexpr int SPREAD_HALF = 64 << BITS;
constexpr int TEAM_TABLE_BYTES = SPREAD ? 2 * SPREAD_HALF : 0;
constexpr int MIN_BLOCKS = BITS <= 4 && ROWS <= 4 ? 2 : 1;  // on a processor: this kernel's and the next one's
// Rows of x that instructions are laid out for: two where launches.csv has no float16 program that spills for it.
constexpr int ROWS_AHEAD = ROWS >= 4 && (MAX_THREADS <= 256 || (BITS == 2 && !NORM)) ? 2 : 1;

__device__ __forceinline__ void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
typedef u32 Table[2][TABLE_BYTES / 4];  // of rows g and g + 8

__device__ __forceinline__ void load_table(Table& table, const u8* rows, int g) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        if (TABLE_BYTES == 4) table[half][0] = *reinterpret_cast<const u32*>(rows + (g + 8 * half) * 4);
        #pragma unroll
        for (int i = 0; i + 2 <= TABLE_BYTES / 4; i += 2) {
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
// The upper half of a word whose halves are finite numbers in half precision (bits 10 to 14 are not all set), times 1 in both
// halves: products are another pipe's work, and looking up has enough of its own.
__device__ __forceinline__ u32 upper_half(u32 word) {
    u32 d;
    asm("{ .reg .b16 low, high; .reg .b32 twice; mov.b32 {low, high}, %1; mov.b32 twice, {high, high};"
        "  mul.rn.f16x2 %0, twice, %2; }" : "=r"(d) : "r"(word), "r"(0x3c003c00u));
    return d;
}
__device__ __forceinline__ u32 masked(u32 word, u32 mask) {  // here, not once for each shift of it
    u32 d;
    asm("and.b32 %0, %1, %2;" : "=r"(d) : "r"(word), "r"(mask));
    return d;
}
// Eight weights of row g + 8 * half: columns 8 * part .. of the lane's 32. Nibble n of the selector is column 8 * part + n.
__device__ __forceinline__ u32 low_planes(const Unit& x, int half, int part) {
    u32 word = half ? (part < 2 ? x.pairs.z : x.pairs.w) : (part < 2 ? x.pairs.x : x.pairs.y);
    return part & 1 ? word >> 2 : word;
}
__device__ __forceinline__ u32 plane_word(const Unit& x, int j, int half) { return half ? x.plane[j].y : x.plane[j].x; }
// At bit 2 of each nibble. Of three planes bit 3 is zero: masked before the shift, which two parts share.
__device__ __forceinline__ u32 third_plane(const Unit& x, int half, int part) {
    u32 word = plane_word(x, 0, half);
    if (BITS == 3) word = masked(word, part < 2 ? 0x55555555u : 0xaaaaaaaau);
    return part == 0 ? word << 2 : part == 1 ? word : part == 2 ? word << 1 : word >> 1;
}
__device__ __forceinline__ u32 plane_at(const Unit& x, int j, int half, int part, int bit) {  // of each nibble
    const int by = bit - (part == 0 ? 0 : part == 1 ? 2 : part == 2 ? 1 : 3);
    const u32 word = plane_word(x, j, half);
    return by < 0 ? word >> -by : word << by;
}

struct Digits {  // high and low digits of eight weights, one byte each; of several tables all but one yield zeros
    u32 high[EIGHTHS][2], low[EIGHTHS][2];
};

// Entries in memory are STRIDE of them apart.
template <int STRIDE>
__device__ __forceinline__ Digits lookup(const Unit& x, const Table& table, const u8* memory, int half, int part) {
    Digits d;
    const u32* row = table[half];
#if BITS == 2
    u32 s = low_planes(x, half, part) & 0x33333333u;
    #pragma unroll
    for (int k = 0; k < 2; k++, s = upper_half(s)) {
        d.high[0][k] = TABLE_DIGITS == 2 ? permute(row[0], row[0], s) : 0;
        d.low[0][k] = permute(row[TABLE_DIGITS - 1], row[TABLE_DIGITS - 1], s);
    }
#elif BITS == 3
    u32 s = pick(low_planes(x, half, part), third_plane(x, half, part), 0x33333333u);
    #pragma unroll
    for (int k = 0; k < 2; k++, s = upper_half(s)) {
        d.high[0][k] = permute(row[0], row[1], s);
        d.low[0][k] = permute(row[2], row[3], s);
    }
#elif BITS <= 5
    // A selector's bit 3 replicates the sign of the byte: digits have 7 bits, so it yields zero. It is set in the tables
    // of eight that an entry is not in.
    u32 three = pick(low_planes(x, half, part), third_plane(x, half, part), 0x33333333u);
    u32 fourth = plane_at(x, 1, half, part, 3);
#if BITS == 5
    u32 fifth = plane_at(x, 2, half, part, 3);
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
    u32 nibble = pick(three, plane_at(x, 1, half, part, 3), 0x77777777u), upper = 0;
    #pragma unroll
    for (int j = 2; j < PLANES; j++) upper = pick(plane_at(x, j, half, part, j - 2), upper, 0x11111111u << (j - 2));
    u32 even = pick(nibble, upper << 4, 0x0f0f0f0fu), odd = pick(nibble >> 4, upper, 0x0f0f0f0fu);
    auto entry = [&](u32 codes, int byte) -> u32 {
        return reinterpret_cast<const u16*>(memory)[STRIDE * permute(codes, 0, 0x4440u + byte)];
    };
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        u32 a = permute(entry(even, 2 * k), entry(odd, 2 * k), 0x5140u);
        u32 b = permute(entry(even, 2 * k + 1), entry(odd, 2 * k + 1), 0x5140u);
        d.low[0][k] = permute(a, b, 0x5410u);
        d.high[0][k] = permute(a, b, 0x7632u);
    }
#endif
    return d;
}


// Scales and, unless they are of groups, tables of a block's rows into shared memory.
__device__ __forceinline__ void copy_tables(u8* to, float2* to_scales, const u8* tables, const float2* scales, int rows,
                                            int thread, int threads) {
    #pragma unroll 1
    for (int i = thread * 16; i < rows * 8; i += threads * 16)
        copy16(reinterpret_cast<u8*>(to_scales) + i, reinterpret_cast<const u8*>(scales) + i);
    #pragma unroll 1
    for (int i = thread * 16; i < rows * SHARED_TABLE_BYTES; i += threads * 16) copy16(to + i, tables + i);
}
__device__ __forceinline__ void prepare_tables(u8*, float2*, int, int, int) {}
// Where Sums find the tables of a team's next tile, which are at `tables`. All of its threads call it.
__device__ __forceinline__ const u8* team_tables(u8* of_team, const u8* tables, int team, int thread, int threads) {
    if (!SPREAD) return tables;
    auto meet = [&] {  // there are no more than 8 teams of several warps, for which a block has barriers enough
        if (threads == 32) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(threads) : "memory");
    };
    meet();  // the tile before is done with
    #pragma unroll 1
    for (int i = thread; i < TILE * TABLE_BYTES / 16; i += threads) {  // of eight entries of a row
        const int g = i % 8, half = i / (1 << BITS), eight = i / 8 % ((1 << BITS) / 8);
        const uint4 raw = *reinterpret_cast<const uint4*>(tables + (g + 8 * half) * TABLE_BYTES + 16 * eight);
        const u32 two[4] = {raw.x, raw.y, raw.z, raw.w};
        u8* to = of_team + half * SPREAD_HALF + eight * 8 * 64 + g * 8;  // of lanes 4 * g ..
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            const u32 word = permute(two[k / 2], two[k / 2], k % 2 ? 0x3232u : 0x1010u);
            *reinterpret_cast<uint2*>(to + k * 64) = make_uint2(word, word);
        }
    }
    meet();
    return of_team;
}

// Where this lane's eight columns of each of its warp's steps of x go, the first of which is the block's step `own`: a row is
// DIGITS lines of `pitch` bytes.
struct ColumnsOut {
    u32 mine;  // in shared memory
    int pitch;

    __device__ __forceinline__ ColumnsOut(u8* memory, int pitch, int own, int lane)
        : mine(shared_address(memory + own * STEP + 8 * lane)), pitch(pitch) {}

    // Integers (see ROUNDER) of row m, `ahead` of the block's columns after the warp's first, if these are there. Adds their
    // digits up.
    __device__ __forceinline__ void put(int m, int ahead, bool there, const u32 (&n)[8], int (&sums)[DIGITS]) const {
        u32 byte[2][DIGITS];
        #pragma unroll
        for (int q = 0; q < 2; q++) four_digits(byte[q], n[4 * q], n[4 * q + 1], n[4 * q + 2], n[4 * q + 3], sums);
        #pragma unroll
        for (int d = 0; d < DIGITS; d++)
            store8(mine + (m * DIGITS + d) * pitch + ahead, byte[0][d], byte[1][d], there);
    }
};

// What this lane feeds to column g of each mma.
struct ColumnsIn {
    const u8* row[NT];

    __device__ __forceinline__ ColumnsIn(const u8* memory, int pitch, int lane) {
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            int column = (n * 8 + (lane >> 2)) % (ROWS * DIGITS);  // m * DIGITS + d; spare columns repeat others
            row[n] = memory + column * pitch + 32 * (lane & 3);
        }
    }
};

// A warp's part of a tile's products.
struct Sums {
    Table table;
    const u8* memory;  // of the lane, if SPREAD
    int high[NT][4] = {}, low[NT][4] = {};  // sums of products with the digits of entries

    __device__ __forceinline__ Sums(const u8* tables, int lane) : memory(tables) {
        if (REGISTER_TABLE && !GROUPED) load_table(table, memory, lane >> 2);
        if (SPREAD) memory += 2 * lane;
    }

    // Adds the block's step `kept`, the row's `step`, whose weights are at `slot`; calls slot_is_read once they are in registers.
    template <typename F>
    __device__ __forceinline__ void add(const u8* slot, const ColumnsIn& x, int kept, int step, const Weight& weight, int tile,
                                        int lane, F&& slot_is_read) {
        const int g = lane >> 2;
        constexpr int STRIDE = SPREAD ? 32 : 1;
        #pragma unroll
        for (int u = 0; u < 2; u++) {
            const Unit now = read_unit(slot, u, lane);
            if (u == 1) slot_is_read();
            if (GROUPED) memory = group_tables(weight, tile, 2 * step + u, lane & 3);
            if (REGISTER_TABLE && GROUPED) load_table(table, memory, g);
            #pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                uint4 b[NT];
                #pragma unroll
                for (int n = 0; n < NT; n++)
                    b[n] = *reinterpret_cast<const uint4*>(x.row[n] + kept * STEP + u * UNIT + 16 * pair);
                #pragma unroll
                for (int k = 0; k < 2; k++) {
                    Digits r0 = lookup<STRIDE>(now, table, memory + (SPREAD ? 0 : g * TABLE_BYTES), 0, 2 * pair + k);
                    Digits r1 = lookup<STRIDE>(now, table, memory + (SPREAD ? SPREAD_HALF : (g + 8) * TABLE_BYTES), 1,
                                               2 * pair + k);
                    #pragma unroll
                    for (int n = 0; n < NT; n++) {
                        u32 b0 = k ? b[n].z : b[n].x, b1 = k ? b[n].w : b[n].y;
                        #pragma unroll
                        for (int e = 0; e < EIGHTHS; e++) {  // all but one are zero: adding them is cheaper than blending
                            if (TABLE_DIGITS == 2)
                                mma(high[n], r0.high[e][0], r1.high[e][0], r0.high[e][1], r1.high[e][1], b0, b1);
                            mma(low[n], r0.low[e][0], r1.low[e][0], r0.low[e][1], r1.low[e][1], b0, b1);
                        }
                    }
                }
            }
        }
    }

    // put(m, row of the tile, product with x's integers), from the lanes that have one.
    template <typename F>
    __device__ __forceinline__ void finish(const u8*, int lane, F&& put) const {
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float even = float(BASE) * float(high[n][2 * half]) + float(low[n][2 * half]);
                float odd = float(BASE) * float(high[n][2 * half + 1]) + float(low[n][2 * half + 1]);
                int m = n * 4 + (lane & 3);
                if (m < ROWS) put(m, (lane >> 2) + 8 * half, even + 256.0f * odd);
            }
        }
    }
};
