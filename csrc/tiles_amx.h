// The tile registers of AMX: eight, of up to 16 rows of 64 bytes.
//
// Written in assembly because the compilers' intrinsics don't tell them which memory is read.
#pragma once

#include <cstdint>

namespace turbolm {
namespace {

// Rows, and bytes of a row, of each tile.
struct TileShapes {
    struct Shape {
        int rows, bytes;
    };
    Shape of[8];
};

// Gives the tiles of this thread their shapes, and zeros.
inline void configure_tiles(const TileShapes& shapes) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int i = 0; i < 8; ++i) {
        config.bytes[i] = static_cast<uint16_t>(shapes.of[i].bytes);
        config.rows[i] = static_cast<uint8_t>(shapes.of[i].rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
}

// Gives the registers up: the system need not keep them any longer.
inline void release_tiles() { asm volatile("tilerelease"); }

template <int tile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int tile>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}

// sum[row][column] += products of int8 x[row][i] and w[i / 4][4 * column + i % 4], over all i.
template <int sum, int x, int w>
inline void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(x), "i"(w));
}

// The same with bf16 x[row][i] and w[i / 2][2 * column + i % 2], in float32: even and odd i apart,
// each in turn, then both added to the sum.
template <int sum, int x, int w>
inline void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(x), "i"(w));
}

}  // namespace
}  // namespace turbolm
