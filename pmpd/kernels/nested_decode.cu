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
            Digits d = lookup<1>(now, table, memory + (g + 8 * half) * TABLE_BYTES, half, part);
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
