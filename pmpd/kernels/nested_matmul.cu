// The product with a nested weight, and the weight decoded to half precision.

// Arguments: tables [tiles, groups, TILE, TABLE_BYTES]; scales [16 * tiles] of scale and offset; out [rows, out_features],
// or half of that if GATED; norm_weight, residual (as out) and bias may be null. `early` of the STAGES steps are asked for
// before the kernels before have ended; `late` lets the next kernel come only once x is here.
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
#if NORM
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
                            #pragma unroll
                            for (int e = 0; e < EIGHTHS; e++) {  // all but one are zero: adding them is cheaper than blending
                                mma(high[n], r0.high[e][0], r1.high[e][0], r0.high[e][1], r1.high[e][1], b0, b1);
                                mma(low[n], r0.low[e][0], r1.low[e][0], r0.low[e][1], r1.low[e][1], b0, b1);
                            }
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
    constexpr int PARTS = GATED ? 2 : 1, OUTPUTS = TILE / PARTS;  // rows of the weight in an output; outputs of a tile
    #pragma unroll 1
    for (int i = threadIdx.x; i < my_tiles * ROWS * OUTPUTS * 4; i += blockDim.x) {
        const int r = i / 4 % OUTPUTS, m = i / (4 * OUTPUTS) % ROWS, local = i / (4 * OUTPUTS * ROWS);
        float product[PARTS] = {}, sum = 0, squares = 0, value[PARTS];
        #pragma unroll 1
        for (int k = i % 4; k < splits; k += 4) {
            #pragma unroll
            for (int h = 0; h < PARTS; h++)
                product[h] += partial[((local * splits + k) * ROWS + m) * TILE + r + OUTPUTS * h];
            sum += staged.sum[m][k];
            if (NORM) squares += staged.squares[m][k];
        }
        #pragma unroll
        for (int h = 0; h < PARTS; h++) {
            const float2 scale = block_scales[local * TILE + r + OUTPUTS * h];
            value[h] = scale.x * product[h] + scale.y * sum;
        }
        #pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            #pragma unroll
            for (int h = 0; h < PARTS; h++) value[h] += __shfl_xor_sync(~0u, value[h], d);
            if (NORM) squares += __shfl_xor_sync(~0u, squares, d);
        }
        const int row = (first_tile + local) * TILE + r;
        if (i % 4 || m >= rows || row >= out_features) continue;
        #pragma unroll
        for (int h = 0; h < PARTS; h++) {
            if (NORM) value[h] *= rsqrtf(squares / in_features + norm_eps);
            if (bias) value[h] += to_float(bias[row + OUTPUTS * h]);
        }
        if (GATED) value[0] *= value[PARTS - 1] / (1.0f + __expf(-value[0]));
        const size_t at = size_t(m) * (out_features / PARTS) + (first_tile + local) * OUTPUTS + r;
        if (residual) value[0] += to_float(residual[at]);
        out[at] = from_float(value[0]);
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
                u32 h = 0, l = 0;
                #pragma unroll
                for (int e = 0; e < EIGHTHS; e++) h |= d.high[e][i / 4], l |= d.low[e][i / 4];
                int shift = 8 * (i % 4);
                float value = scale.x * float(((h >> shift) & 0xffu) * BASE + ((l >> shift) & 0xffu)) + scale.y;
                u32 bits = from_float(value);
                words[i / 2] = i % 2 ? words[i / 2] | bits << 16 : bits;
            }
            *reinterpret_cast<uint4*>(line + 8 * part) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}
