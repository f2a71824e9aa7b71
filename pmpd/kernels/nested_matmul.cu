// The product with a nested weight, by whichever method comes before.

// What a block's shared memory begins with, of a size that the compiler knows. (Variables declared __shared__ have an address
// that it asks for, and waits for, at each use.) Copies to what follows are faster if that begins a line of 128 bytes.
struct __align__(128) Fixed {
    Staged staged;
    u64 barrier;                   // of the inbox
    float squares[CLUSTER][ROWS];  // of the other blocks; the last line is unused, as no array may be empty
};
static_assert(sizeof(Fixed) == FIXED_BYTES, "launch.py has another size");

// Arguments: tables [tiles, groups, TILE, TABLE_BYTES]; scales [16 * tiles] of scale and offset; out [rows, out_features],
// or half of that if GATED; norm_weight, residual (as out) and bias may be null. After `hold` clocks `early` of the STAGES
// steps are asked for, before the kernels before have ended. The next kernel may come then if `late` is 0, once those have ended
// if it is 1, once x is here if it is 2, once a warp is at its last tile if it is 3. A block has 32 lanes x warps that share a
// tile (`splits` in all CLUSTER blocks) x teams. A cluster has `most_tiles` tiles or one less, a block keeps `kept` steps of x.
// (The host divides: here a division takes 25 instructions.)
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
nested_matmul(const u16* x, const u32* packed, const u8* tables, const float2* scales, u16* out, const u16* norm_weight,
              const u16* residual, const u16* bias, float norm_eps, int rows, int out_features, int in_features,
              int group_size, int groups, int most_tiles, int kept, int hold, int early, int late) {
    extern __shared__ __align__(128) u8 shared[];
    Fixed& fixed = *reinterpret_cast<Fixed*>(shared);
    const Staged& staged = fixed.staged;
    const int lane = threadIdx.x, team = __shfl_sync(~0u, threadIdx.z, 0), teams = blockDim.z;
    const int own_splits = blockDim.y, splits = own_splits * CLUSTER, warps = own_splits * teams;
    const int warp = __shfl_sync(~0u, threadIdx.y, 0) + team * own_splits;
    const int thread = lane + 32 * warp, threads = 32 * warps;
    const int rank = cluster_rank();
    // A block's splits are every CLUSTER-th: `own` is this one's place among them. A processor's quarters have every fourth
    // warp, so teams begin with different ones, as some have a step less. (There are no more than 4 teams then.)
    int own = warp - team * own_splits;
    if (own_splits % 4 == 0 && (own += team) >= own_splits) own -= own_splits;
    const int split = own * CLUSTER + rank;
    const int steps = u32(in_features + STEP - 1) / STEP, tiles = u32(out_features + TILE - 1) / TILE;
    const int pitch = kept * STEP + 16;
    const int cluster = blockIdx.x / CLUSTER, with_most = tiles - (most_tiles - 1) * (gridDim.x / CLUSTER);
    const int first_tile = cluster * (most_tiles - 1) + min(cluster, with_most);
    const int my_tiles = most_tiles - (cluster >= with_most);
    u8* const rings = shared + sizeof(Fixed);
    u8* ring = rings + warp * (STAGES * STEP_BYTES);
    u8* const ring_end = ring + STAGES * STEP_BYTES;
    u8* columns = rings + warps * (STAGES * STEP_BYTES);
    // [tile][sum][ROWS][TILE]: a sum of each of this block's splits and, if it finishes the tile, of each other block.
    const int sums_of_tile = own_splits + CLUSTER - 1;
    float* partial = reinterpret_cast<float*>(columns + ROWS * DIGITS * pitch);
    float2* block_scales = reinterpret_cast<float2*>(partial + most_tiles * sums_of_tile * ROWS * TILE);
    u8* block_tables = reinterpret_cast<u8*>(block_scales + most_tiles * TILE);
    u8* const of_team = block_tables + most_tiles * TILE * SHARED_TABLE_BYTES + team * TEAM_TABLE_BYTES;
    auto finished_by = [&](int block) { return (my_tiles - block + CLUSTER - 1) / CLUSTER; };  // tiles
    const Inbox inbox = {shared_address(&fixed.barrier)};
    if (CLUSTER > 1 && thread == 0)
        inbox.open((CLUSTER - 1) * sizeof(float) * ROWS * (finished_by(rank) * TILE + NORM));
    cluster_arrive();

    // Weights do not depend on earlier kernels: ask for them before waiting for those.
    copy_tables(block_tables, block_scales, tables + size_t(first_tile) * TILE * TABLE_BYTES, scales + first_tile * TILE,
                my_tiles * TILE, thread, threads);
    commit_copies();

    const Weight weight = {packed, tables, tiles, in_features, group_size, groups};
    Source source;
    source.plane_bytes = size_t(tiles) * in_features * 2;
    source.pairs = reinterpret_cast<const u8*>(packed) + size_t(first_tile) * in_features * 4 + lane * 16;
    source.planes = reinterpret_cast<const u8*>(packed) + 2 * source.plane_bytes +
                    size_t(first_tile) * in_features * 2 + lane * 16;
    asm volatile("" : "+l"(source.pairs), "+l"(source.planes));  // computed once, not at every use
    int load_tile = team, load_step = split;
    u32 offset = load_tile * (in_features * 4) + split * PAIR_BYTES;
    u8* load_slot = ring;
    auto load_next = [&] {
        if (load_tile < my_tiles && load_step < steps)
            copy_step(load_slot, source, offset, in_features, load_step, lane);
        commit_copies();
        load_slot = load_slot + STEP_BYTES == ring_end ? ring : load_slot + STEP_BYTES;
        load_step += splits, offset += splits * PAIR_BYTES;
        if (load_step >= steps) {
            load_step = split, load_tile += teams;
            offset = load_tile * (in_features * 4) + split * PAIR_BYTES;
        }
    };
#if __CUDA_ARCH__ >= 900
    hold_back(hold);  // before, no kernel begins while another runs
#endif
    #pragma unroll 1
    for (int i = 0; i < early; i++) load_next();
    const int column = split * STEP + 8 * lane;
    Input input = {x + column, norm_weight + column, rows, in_features, in_features - column};
    ColumnsOut columns_out(columns, pitch, own, lane);  // the block's own steps of x alone, closed up
    asm volatile("" : "+l"(input.x), "+r"(input.left), "+r"(columns_out.mine));  // computed now, not after the wait
#if NORM
    if (team == 0 && lane % 8 == 0)
        for (int k = split * STEP + 8 * lane; k < in_features; k += splits * STEP)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(norm_weight + k));
#endif
#if __CUDA_ARCH__ >= 900
    if (late == 0) asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (late == 1) asm volatile("griddepcontrol.launch_dependents;");
#endif
    if (my_tiles == 0) return;
    stage(columns_out, fixed.staged, input, own, own_splits, team, teams, lane, [&] {
        #pragma unroll 1
        for (int i = early; i < STAGES; i++) load_next();
    });
#if __CUDA_ARCH__ >= 900
    if (late == 2) asm volatile("griddepcontrol.launch_dependents;");
#endif
    wait_copies<STAGES>();
    prepare_tables(block_tables, block_scales, my_tiles * TILE, thread, threads);
    __syncthreads();  // tables and columns are there

    cluster_wait();  // all blocks run and their inboxes are open

    const ColumnsIn columns_in(columns, pitch, lane);
    const int own_steps = u32(steps - rank + CLUSTER - 1) / CLUSTER;
    const u8* slot = ring;
    #pragma unroll 1
    for (int tile = team; tile < my_tiles; tile += teams) {
#if __CUDA_ARCH__ >= 900
        if (late == 3 && tile + teams >= my_tiles) asm volatile("griddepcontrol.launch_dependents;");
#endif
        const u8* tile_tables = team_tables(of_team, block_tables + tile * TILE * SHARED_TABLE_BYTES, team,
                                            thread - team * 32 * own_splits, 32 * own_splits);
        Sums sums(tile_tables, lane);
        #pragma unroll 1
        for (int kept = own; kept < own_steps; kept += own_splits) {
            wait_copies<STAGES - 1>();
            __syncwarp();
            sums.add(slot, columns_in, kept, kept * CLUSTER + rank, weight, first_tile + tile, lane, [&] {
                slot = !WHOLE && slot + STEP_BYTES == ring_end ? ring : slot + STEP_BYTES;
                if (!WHOLE) __syncwarp(), load_next();
                else commit_copies();  // of nothing, but wait_copies counts
            });
        }
        float* mine = partial + (tile * sums_of_tile + own) * ROWS * TILE;
        sums.finish(tile_tables, lane, [&](int m, int r, float product) {
            mine[m * TILE + r] = staged.step[m][own] * product;
        });
    }
    __syncthreads();  // the block's partial sums are there

    // What other blocks finish, four rows of a tile a thread.
    for (int turn = 1; turn < CLUSTER; turn++) {
        const int finisher = (rank + turn) % CLUSTER;
        #pragma unroll 1
        for (int i = thread; i < finished_by(finisher) * ROWS * TILE / 4; i += threads) {
            const int r = i % (TILE / 4) * 4, m = i / (TILE / 4) % ROWS, slot = i / (TILE / 4 * ROWS);
            const int local = slot * CLUSTER + finisher;
            float product[4] = {}, sum = 0, squares = 0;
            #pragma unroll 4
            for (int k = 0; k < own_splits; k++) {
                const float4 more = *reinterpret_cast<const float4*>(&partial[((local * sums_of_tile + k) * ROWS + m) * TILE + r]);
                product[0] += more.x, product[1] += more.y, product[2] += more.z, product[3] += more.w;
                sum += staged.sum[m][k];
                if (NORM) squares += staged.squares[m][k];
            }
            #pragma unroll
            for (int h = 0; h < 4; h++) {
                const float2 scale = block_scales[local * TILE + r + h];
                product[h] = scale.x * product[h] + scale.y * sum;
            }
            inbox.send(&partial[((local * sums_of_tile + own_splits + turn - 1) * ROWS + m) * TILE + r], product, finisher);
            if (NORM && slot == 0 && r == 0) inbox.send(&fixed.squares[turn - 1][m], squares, finisher);
        }
    }

    constexpr int PARTS = GATED ? 2 : 1, OUTPUTS = TILE / PARTS;  // rows of the weight in an output; outputs of a tile
    // Of one row there are mostly fewer outputs than threads, so an output gets several lanes, each with its share of the
    // splits; i counts lanes, then always of whole warps.
    constexpr int LANES = ROWS == 1 ? 4 : 1;
    #pragma unroll 1
    for (int i = thread; i < finished_by(rank) * ROWS * OUTPUTS * LANES; i += threads) {
        const int r = i / LANES % OUTPUTS, m = i / (LANES * OUTPUTS) % ROWS, slot = i / (LANES * OUTPUTS * ROWS);
        const int local = slot * CLUSTER + rank;
        float product[PARTS] = {}, sum = 0, squares = 0, value[PARTS];
        #pragma unroll LANES > 1 ? 1 : 4
        for (int k = i % LANES; k < own_splits; k += LANES) {
            #pragma unroll
            for (int h = 0; h < PARTS; h++)
                product[h] += partial[((local * sums_of_tile + k) * ROWS + m) * TILE + r + OUTPUTS * h];
            sum += staged.sum[m][k];
            if (NORM) squares += staged.squares[m][k];
        }
        #pragma unroll
        for (int h = 0; h < PARTS; h++) {
            const float2 scale = block_scales[local * TILE + r + OUTPUTS * h];
            value[h] = scale.x * product[h] + scale.y * sum;
        }
        #pragma unroll
        for (int d = 1; d < LANES; d *= 2) {
            #pragma unroll
            for (int h = 0; h < PARTS; h++) value[h] += __shfl_xor_sync(~0u, value[h], d);
            if (NORM) squares += __shfl_xor_sync(~0u, squares, d);
        }
        const int row = (first_tile + local) * TILE + r;
        if (i % LANES || m >= rows || row >= out_features) continue;
        if (CLUSTER > 1) inbox.wait();
        #pragma unroll
        for (int k = 0; k < CLUSTER - 1; k++) {
            #pragma unroll
            for (int h = 0; h < PARTS; h++) value[h] += partial[((local * sums_of_tile + own_splits + k) * ROWS + m) * TILE + r + OUTPUTS * h];
            if (NORM) squares += fixed.squares[k][m];
        }
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
