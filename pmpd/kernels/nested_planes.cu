// Multiplying by bit planes: the binary tensor cores count, for each plane of the weight and each plane of x, the columns
// that have both bits. For a few low bits and one row of x, with a table a row.
//
// A table of b bits is a polynomial of the code's bits that is linear in each: T[code] = sum over sets S of bits of
// c[S] * (the product of S's bits), where c is the Moebius transform of T, c[S] = sum over R in S of (-1)^|S - R| T[R].
// So w . x = sum over S of c[S] * (B_S . x), with B_S the AND of S's planes: two bits a word of 32 weights take three such
// planes and no look-up. x's integers have two digits of eight bits, each the balanced sum of its planes:
// B_S . x = sum over planes j of weight[j] * popcount(B_S & x_j). The 8 columns of an mma are the planes of a digit.

static_assert(ROWS == 1, "more rows are looked up");
constexpr int SETS = 1 << BITS;                       // of bits; the empty set's coefficient is part of the offset
constexpr int SHARED_TABLE_BYTES = sizeof(float) * SETS;  // of a row
constexpr int TEAM_TABLE_BYTES = 0;
constexpr int ROWS_AHEAD = 1;                         // rows of x that instructions are laid out for
// On a processor: this kernel's and the next one's, where a thread's counts leave that many registers.
constexpr int MIN_BLOCKS = BITS <= (MAX_THREADS == 192 ? 4 : 3) ? 2 : 1;

__device__ __forceinline__ void binary_mma(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Scales and tables of a block's rows into shared memory. Each thread turns those that it copied into coefficients: the last
// threads come first, as the last team has the fewest rows of x, if any.
__device__ __forceinline__ void copy_tables(u8* to, float2* to_scales, const u8* tables, const float2* scales, int rows,
                                            int thread, int threads) {
    for (int row = threads - 1 - thread; row < rows; row += threads) {
        copy8(to_scales + row, scales + row);
        if (TABLE_BYTES == 8) copy8(to + row * SHARED_TABLE_BYTES, tables + row * TABLE_BYTES);
        #pragma unroll
        for (int i = 0; i + 16 <= TABLE_BYTES; i += 16) copy16(to + row * SHARED_TABLE_BYTES + i, tables + row * TABLE_BYTES + i);
    }
}
// Tables become coefficients of the sets, scales included, and scales 1 and the coefficient of the sum of x.
__device__ __forceinline__ void prepare_tables(u8* tables, float2* scales, int rows, int thread, int threads) {
    #pragma unroll 1
    for (int row = threads - 1 - thread; row < rows; row += threads) {
        u32 word[TABLE_BYTES / 4];
        #pragma unroll
        for (int i = 0; i < TABLE_BYTES / 4; i++) word[i] = reinterpret_cast<const u32*>(tables + row * SHARED_TABLE_BYTES)[i];
        int c[SETS];
        #pragma unroll
        for (int i = 0; i < SETS; i++)
            c[i] = BASE * ((word[i / 4] >> (8 * (i % 4))) & 0xff) + ((word[SETS / 4 + i / 4] >> (8 * (i % 4))) & 0xff);
        #pragma unroll
        for (int bit = 1; bit < SETS; bit *= 2) {
            #pragma unroll
            for (int i = 0; i < SETS; i++)
                if (i & bit) c[i] -= c[i ^ bit];
        }
        const float2 scale = scales[row];
        scales[row] = make_float2(1.0f, scale.y + scale.x * float(c[0]));
        #pragma unroll
        for (int i = 0; i < SETS; i++) reinterpret_cast<float*>(tables + row * SHARED_TABLE_BYTES)[i] = scale.x * float(c[i]);
    }
}

__device__ __forceinline__ const u8* team_tables(u8*, const u8* tables, int, int, int) { return tables; }

// How a lane and another one change places of half of what they have: bits of words a and b outside MASK, which are DISTANCE
// apart in the words, against those inside.
template <int OTHER, int DISTANCE, u32 MASK>
struct Exchange {
    u32 times_left, times_right;  // left shifts as products, which are another pipe's work: this one has enough of it
    int left, right;
    u32 replaced;

    __device__ __forceinline__ Exchange(int lane) {
        const bool upper = lane & OTHER;
        left = upper ? DISTANCE : 0, right = upper ? 0 : DISTANCE, replaced = upper ? ~MASK : MASK;
        times_left = 1u << left, times_right = 1u << right;
        asm volatile("" : "+r"(left), "+r"(right), "+r"(replaced), "+r"(times_left), "+r"(times_right));  // once, not at every use
    }
    __device__ __forceinline__ void operator()(u32& a, u32& b) const {
        const u32 theirs = __shfl_xor_sync(~0u, pick(b * times_left, a >> right, MASK), OTHER);
        a = pick(theirs * times_right, a, replaced);
        b = pick(theirs >> left, b, replaced);
    }
};

// Where the planes of this lane's eight columns of each of its warp's steps of x go. A step is what the 32 lanes
// read: of plane g of both digits, words t and 4 + t of the step's eight. A word's bits are in the order of the weight's:
// column 8 * p + n at bit 4 * n + (0, 2, 1, 3)[p].
struct ColumnsOut {
    u32 mine;  // in shared memory
    Exchange<1, 2, 0xccccccccu> neighbours;
    Exchange<2, 1, 0xaaaaaaaau> next_but_one;

    __device__ __forceinline__ ColumnsOut(u8* memory, int, int own, int lane) : neighbours(lane), next_but_one(lane) {
        const int word = lane >> 2, plane = 2 * (lane & 1) + (lane >> 1 & 1);  // and plane + 4
        mine = shared_address(memory + own * STEP * DIGITS + (plane * 4 + word % 4) * 16 + word / 4 * 4);
    }
    // Integers (see ROUNDER) of the row, `ahead` of the block's columns after the warp's first, if these are there. Adds their
    // digits up. All lanes call it.
    __device__ __forceinline__ void put(int, int ahead, bool there, const u32 (&n)[8], int (&sums)[DIGITS]) const {
        u32 word[2][DIGITS];  // [column % 2]; byte k has column 2 * k + .., bit j plane j
        #pragma unroll
        for (int q = 0; q < 2; q++) four_digits(word[q], n[q], n[q + 2], n[q + 4], n[q + 6], sums);
        // Bits of a word are [column / 2][plane]; the quad's lanes are the parts p.
        #pragma unroll
        for (int q = 0; q < 2; q++) neighbours(word[q][0], word[q][1]);
        #pragma unroll
        for (int q = 0; q < 2; q++) next_but_one(word[q][0], word[q][1]);
        const u32 to = mine + ahead * DIGITS;
        #pragma unroll
        for (int d = 0; d < DIGITS; d++) {  // planes 4 apart against columns 1 apart
            store4(to + 8 * d, pick(word[1][d] << 4, word[0][d], 0xf0f0f0f0u), there);
            store4(to + 8 * d + 4 * 4 * 16, pick(word[1][d], word[0][d] >> 4, 0xf0f0f0f0u), there);
        }
    }
};

struct ColumnsIn {
    const u8* mine;
    __device__ __forceinline__ ColumnsIn(const u8* memory, int, int lane) : mine(memory + lane * 16) {}
};

// A warp's part of a tile's products.
struct Sums {
    int count[SETS][DIGITS][4] = {};

    __device__ __forceinline__ Sums(const u8*, int) {}

    // Adds the block's step `kept` whose weights are at `slot`; calls slot_is_read once they are in registers.
    template <typename F>
    __device__ __forceinline__ void add(const u8* slot, const ColumnsIn& x, int kept, int, const Weight&, int, int lane,
                                        F&& slot_is_read) {
        u32 plane[BITS][4];  // of table index bit i: rows g and g + 8 of both units
        #pragma unroll
        for (int u = 0; u < 2; u++) {
            const Unit now = read_unit(slot, u, lane);
            plane[0][2 * u] = pick(now.pairs.y << 1, now.pairs.x, 0xaaaaaaaau);
            plane[0][2 * u + 1] = pick(now.pairs.w << 1, now.pairs.z, 0xaaaaaaaau);
            plane[1][2 * u] = pick(now.pairs.y, now.pairs.x >> 1, 0xaaaaaaaau);
            plane[1][2 * u + 1] = pick(now.pairs.w, now.pairs.z >> 1, 0xaaaaaaaau);
            #pragma unroll
            for (int j = 0; j < PLANES; j++) plane[2 + j][2 * u] = now.plane[j].x, plane[2 + j][2 * u + 1] = now.plane[j].y;
        }
        slot_is_read();
        const uint4 b = *reinterpret_cast<const uint4*>(x.mine + kept * STEP * DIGITS);
        #pragma unroll
        for (int set = 1; set < SETS; set++) {
            u32 product[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                product[i] = ~0u;
                #pragma unroll
                for (int bit = 0; bit < BITS; bit++)
                    if (set >> bit & 1) product[i] &= plane[bit][i];
            }
            binary_mma(count[set][0], product, b.x, b.y);
            binary_mma(count[set][1], product, b.z, b.w);
        }
    }

    // put(0, row of the tile, product with x's integers), from the lanes that have one.
    template <typename F>
    __device__ __forceinline__ void finish(const u8* tables, int lane, F&& put) const {
        const int g = lane >> 2, t = lane & 3, second = t == 3 ? -2 : 2;  // planes 2t and 2t + 1; plane 7 is the sign
        float sum[2] = {};  // [half]
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4* from = reinterpret_cast<const float4*>(tables + (g + 8 * half) * SHARED_TABLE_BYTES);
            float4 c[SETS / 4];
            #pragma unroll
            for (int i = 0; i < SETS / 4; i++) c[i] = from[i];
            #pragma unroll
            for (int set = 1; set < SETS; set++) {
                const int(&n)[DIGITS][4] = count[set];
                const int low = n[0][2 * half] + second * n[0][2 * half + 1];
                const int high = n[1][2 * half] + second * n[1][2 * half + 1];
                const float4& of = c[set / 4];
                const float factor = set % 4 == 0 ? of.x : set % 4 == 1 ? of.y : set % 4 == 2 ? of.z : of.w;
                sum[half] += factor * float(low + 256 * high);
            }
            sum[half] *= float(1 << (2 * t));
        }
        // The quad's lanes have parts of the same two sums. Neighbours divide them up, each gives one away.
        const bool odd = t & 1;
        float mine = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 1);
        mine += __shfl_xor_sync(~0u, mine, 2);
        if (t < 2) put(0, g + 8 * t, mine);
    }
};
