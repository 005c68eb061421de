// How linear.cu gets weights, and multiplies by them: one struct per layout.
//
//   seek      to a row tile and unit
//   copy      slot SLOT, SLOT * WARPS_K units further on, into shared memory
//   multiply  by the TILES_M units there
//   prefetch  units of a tile into L2
//   x_column, x_place  which 8 k of token g a lane copies for a block of x (512 bytes, 32 k of 8 tokens), and where to
//             in the block, in 16 bytes

#include "words.cuh"

#if WEIGHTS == 1
// Products of codes are exact; the scale multiplies a group's sum. All lanes of a warp copy scales for each other.
struct Int4Weights {
    static constexpr int UNIT_BYTES = INT4_UNIT_BYTES;
    const char* place;  // this lane's, in the codes

    __device__ __forceinline__ void seek(const Arguments& a, int tile, int unit, int lane) {
        int last = a.n / 16 - 1;
        long long at = (long long)min(tile, last) * (a.k / UNIT_K) + unit;
        place = static_cast<const char*>(a.w) + at * UNIT_BYTES + lane * 16;
    }

    template <int SLOT>
    __device__ __forceinline__ void copy(u32 to_shared, int lane) const {
        constexpr int OFFSET = SLOT * WARPS_K * UNIT_BYTES;
        u32 to = to_shared + lane * 16;
        copy_async_once<OFFSET>(to, place);
        copy_async_once<OFFSET + 512>(to + 512, place);
        if (lane < GROUPS * 4) copy_async_once<OFFSET + INT4_CODE_BYTES>(to + INT4_CODE_BYTES, place);
    }

    __device__ static __forceinline__ void prefetch(const Arguments& a, int tile, int unit, int units, int lane) {
        if (lane > 0 || units <= 0) return;
        long long at = (long long)tile * (a.k / UNIT_K) + unit;
        prefetch_to_l2(static_cast<const char*>(a.w) + at * UNIT_BYTES, units * UNIT_BYTES);
    }

    // As `read_matrices` wants them: 8 tokens by 8 k in 128 bytes.
    __device__ static __forceinline__ int x_column(int block, int lane) { return block * 32 + (lane & 3) * 8; }
    __device__ static __forceinline__ int x_place(int lane) { return (lane & 3) * 8 + (lane >> 2); }

    __device__ static __forceinline__ void multiply(const Arguments& a, Sums& sums, u32 w_unit, u32 x_unit, int lane) {
        constexpr int GROUP_BLOCKS = X_BLOCKS / GROUPS;
        sync_warp();
        uint4 codes[TILES_M];
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            uint2 words[TILES_M];
#pragma unroll
            for (int m = 0; m < TILES_M; m++)
                words[m] = read_shared_pair(w_unit + m * UNIT_BYTES + INT4_CODE_BYTES + group * 64 + (lane >> 2) * 8);
            Sums parts = {};
#pragma unroll
            for (int block = group * GROUP_BLOCKS; block < (group + 1) * GROUP_BLOCKS; block++) {
                if (block % 2 == 0) {
#pragma unroll
                    for (int m = 0; m < TILES_M; m++)
                        codes[m] = read_shared(w_unit + m * UNIT_BYTES + block / 2 * 512 + lane * 16);
                }
                uint4 b[TILES_T];
#pragma unroll
                for (int tile = 0; tile < TILES_T; tile++)
                    b[tile] = read_matrices(x_unit + (block * TILES_T + tile) * 512 + lane * 16);
#pragma unroll
                for (int m = 0; m < TILES_M; m++) {
                    const u32 low = Int4Row(words[m].x).minus_zero, high = Int4Row(words[m].y).minus_zero;
                    u32 f[2][4];
                    int4_fragment(block % 2 ? codes[m].z : codes[m].x, a.code_mask, low, high, f[0]);
                    int4_fragment(block % 2 ? codes[m].w : codes[m].y, a.code_mask, low, high, f[1]);
#pragma unroll
                    for (int tile = 0; tile < TILES_T; tile++) {
                        multiply_add(parts[m][tile], f[0][0], f[0][1], f[0][2], f[0][3], b[tile].x, b[tile].y);
                        multiply_add(parts[m][tile], f[1][0], f[1][1], f[1][2], f[1][3], b[tile].z, b[tile].w);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
                const float low = Int4Row(words[m].x).scale, high = Int4Row(words[m].y).scale;
#pragma unroll
                for (int tile = 0; tile < TILES_T; tile++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) sums[m][tile][e] += parts[m][tile][e] * (e < 2 ? low : high);
                }
            }
        }
        sync_warp();
    }
};
using Weights = Int4Weights;
#else

// Two pairs of elements out of 4 bytes, exactly.
__device__ __forceinline__ void expand_bytes(u32 bytes, u32& low, u32& high) {
    u32 pairs[2] = {spread_low_bytes(bytes), spread_high_bytes(bytes)}, out[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 sign = pairs[i] & 0x00800080, rest = pairs[i] & 0x007f007f;
#if WEIGHTS == 2 && ELEMENT_FP16
        out[i] = add_pairs((pairs[i] ^ 0x00800080) | 0x64006400, 0xe480e480);  // 1024 + 128 + x, -1152
#elif WEIGHTS == 2
        out[i] = add_pairs(rest | 0x43004300, sign | 0xc300c300);  // 128 + 7 bits of x, -128 or -256
#elif ELEMENT_FP16
        out[i] = multiply_pairs(rest << 7 | sign << 8, 0x5c005c00);  // 2^8: the exponents' biases differ
#else
        out[i] = multiply_pairs(rest << 4 | sign << 8, 0x7b807b80);  // 2^120
#endif
    }
    low = out[0], high = out[1];
}

// Rows as they are, of 16 or 8 bits. A lane's 16 bytes are consecutive k of one row.
struct RowWeights {
    static constexpr int UNIT_BYTES = 2048;
    static constexpr int WEIGHT_BYTES = WEIGHTS == 0 ? 2 : 1;
    static constexpr int HALF_BLOCKS = X_BLOCKS / 2;
    const char* low;  // this lane's place in row g
    int rise;         // bytes from there to row g + 8

    __device__ __forceinline__ void seek(const Arguments& a, int tile, int unit, int lane) {
        int last = (GATED ? a.n / 2 : a.n) - 1;
        int row = min(tile * TILE_ROWS + (lane >> 2), last);
        rise = (GATED ? a.n / 2 : min(8, last - row)) * a.k * WEIGHT_BYTES;
        low = static_cast<const char*>(a.w) + (long long)row * a.k * WEIGHT_BYTES + unit * 128 + (lane & 3) * 16;
    }

    template <int SLOT>
    __device__ __forceinline__ void copy(u32 to_shared, int lane) const {
        constexpr int OFFSET = SLOT * WARPS_K * 128;
        u32 to = to_shared + lane * 16;
        const char* high = low + rise;
        copy_async_once<OFFSET>(to, low);
        copy_async_once<OFFSET + 64>(to + 1024, low);
        copy_async_once<OFFSET>(to + 512, high);
        copy_async_once<OFFSET + 64>(to + 1536, high);
    }

    // One lane per row of the tile.
    __device__ static __forceinline__ void prefetch(const Arguments& a, int tile, int unit, int units, int lane) {
        if (lane >= 16 || units <= 0) return;
        int row = GATED ? min(tile * 8 + (lane & 7), a.n / 2 - 1) + (lane >> 3) * (a.n / 2)
                        : min(tile * 16 + lane, a.n - 1);
        const char* from = static_cast<const char*>(a.w) + (long long)row * a.k * WEIGHT_BYTES;
        prefetch_to_l2(from + (long long)unit * 128, units * 128);
    }

    // The k of the lane's bytes.
    __device__ static __forceinline__ int x_column(int block, int lane) {
        if (WEIGHT_BYTES == 2) return block * 32 + (lane & 3) * 8;
        return block / 2 * 64 + (lane & 3) * 16 + block % 2 * 8;
    }
    __device__ static __forceinline__ int x_place(int lane) { return lane; }

    // 4 of the lane's k of rows g and g + 8 (gated: g of the second half of w): the number `i` of its 16 bytes.
    __device__ static __forceinline__ void fragment(const uint4& g, const uint4& g8, int i, u32 (&a)[4]) {
        if (WEIGHT_BYTES == 2) {
            a[0] = word_of(g, 2 * i), a[1] = word_of(g8, 2 * i);
            a[2] = word_of(g, 2 * i + 1), a[3] = word_of(g8, 2 * i + 1);
        } else {
            expand_bytes(word_of(g, i), a[0], a[2]);
            expand_bytes(word_of(g8, i), a[1], a[3]);
        }
    }

    __device__ static __forceinline__ void multiply(const Arguments&, Sums& sums, u32 w_unit, u32 x_unit, int lane) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 g[TILES_M], g8[TILES_M];
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
                u32 from = w_unit + m * UNIT_BYTES + half * 1024 + lane * 16;
                g[m] = read_shared(from), g8[m] = read_shared(from + 512);
            }
#pragma unroll
            for (int block = 0; block < HALF_BLOCKS; block++) {
                u32 f[TILES_M][2][4];
#pragma unroll
                for (int m = 0; m < TILES_M; m++) {
                    fragment(g[m], g8[m], 2 * block, f[m][0]);
                    fragment(g[m], g8[m], 2 * block + 1, f[m][1]);
                }
#pragma unroll
                for (int tile = 0; tile < TILES_T; tile++) {
                    const u32 from = x_unit + ((half * HALF_BLOCKS + block) * TILES_T + tile) * 512 + lane * 16;
                    const uint4 b = read_shared(from);
#pragma unroll
                    for (int m = 0; m < TILES_M; m++) {
                        multiply_add(sums[m][tile], f[m][0][0], f[m][0][1], f[m][0][2], f[m][0][3], b.x, b.y);
                        multiply_add(sums[m][tile], f[m][1][0], f[m][1][1], f[m][1][2], f[m][1][3], b.z, b.w);
                    }
                }
            }
        }
    }
};
using Weights = RowWeights;
#endif
