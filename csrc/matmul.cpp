#include "matmul.h"

#include "isa.h"

namespace turbolm {
namespace {

// Inputs of at most this many values are laid out by every thread for itself: cheaper than a barrier.
constexpr int64_t max_private_values = 2048;

// What this instruction set multiplies with.
struct Selection {
    const MatmulKernels* kernels;
    const MatmulKernels* tile_kernels;  // for many rows of quantized formats, or null
    const Bf16Kernels* bf16;            // or null: bf16 weights are multiplied in float32
    int64_t chunk_bytes;  // of rows that stay in a core's second-level cache while the weights stream by
};

constexpr int64_t small_chunk = 384 << 10, large_chunk = 1 << 20;

Selection selection() {
    switch (isa()) {
#if defined(TURBOLM_BUILD_AMX)
        case Isa::amx: return {&matmul_avx512vnni, &matmul_amx, &bf16_amx, large_chunk};
#endif
#if defined(TURBOLM_BUILD_AVX512BF16)
        case Isa::avx512bf16: return {&matmul_avx512vnni, nullptr, &bf16_avx512, small_chunk};
#endif
#if defined(TURBOLM_BUILD_AVX512VNNI)
        case Isa::avx512vnni: return {&matmul_avx512vnni, nullptr, nullptr, small_chunk};
#endif
#if defined(TURBOLM_BUILD_AVX512)
        case Isa::avx512: return {&matmul_avx512, nullptr, nullptr, small_chunk};
#endif
#if defined(TURBOLM_BUILD_AVXVNNI)
        case Isa::avxvnni: return {&matmul_avxvnni, nullptr, nullptr, small_chunk};
#endif
#if defined(TURBOLM_BUILD_AVX2)
        case Isa::avx2: return {&matmul_avx2, nullptr, nullptr, small_chunk};
#endif
#if defined(TURBOLM_BUILD_NEON)
        case Isa::neon: return {&matmul_neon, nullptr, nullptr, small_chunk};
#endif
        default: return {&matmul_generic, nullptr, nullptr, small_chunk};
    }
}

// The layouts of x.
enum Layout { quantized, dense, bf16, num_layouts };

Layout layout_of(const LinearPart& part, const Selection& use) {
    if (!format_layout(part.format).is_dense) return quantized;
    return part.format == Format::bf16 && use.bf16 != nullptr ? bf16 : dense;
}

int64_t row_bytes(Layout layout, int64_t k) {
    switch (layout) {
        case quantized: return quantized_row_bytes(k);
        case dense: return dense_row_bytes(k);
        default: return bf16_row_bytes(k);
    }
}

int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where a call keeps its input, in each layout that its parts read; null elsewhere.
struct Tiles {
    uint8_t* of[num_layouts];
};

// Half-open ranges of rows and of k, the latter in blocks of 32.
struct Range {
    int64_t first_row, last_row, first, last;
};

// What a thread lays out: some rows, or, where these are few, some of k in all rows.
Range range_of(const MatmulArgs& args, const Team& team) {
    Range range{0, args.rows, 0, args.linear->k};
    if (args.rows >= 4 * team.num_threads) {
        share(team, args.rows, 1, &range.first_row, &range.last_row);
    } else {
        share(team, args.linear->k, 32, &range.first, &range.last);
    }
    return range;
}

void lay_out_dense(const MatmulArgs& args, int64_t start, int64_t count, const Range& range, float* tile) {
    const int64_t k = args.linear->k;
    for (int64_t row = range.first_row; row < range.last_row; ++row) {
        const float* from = args.x + (start + row) * args.ldx;
        for (int64_t i = range.first; i < range.last; ++i) tile[i * count + row] = from[i];
        if (range.last == k && k % 2 != 0) tile[k * count + row] = 0.0f;
    }
}

// Part of the input, tile by tile.
void lay_out(const MatmulArgs& args, const Selection& use, const Tiles& tiles, const Range& range) {
    const int64_t k = args.linear->k;
    for (int64_t start = range.first_row / tile_rows * tile_rows; start < range.last_row; start += tile_rows) {
        const int64_t count = args.rows - start < tile_rows ? args.rows - start : tile_rows;
        Range part = range;  // rows of the tile
        part.first_row = range.first_row > start ? range.first_row - start : 0;
        part.last_row = range.last_row - start < count ? range.last_row - start : count;
        const auto lay_out_with = [&](auto* function, Layout layout) {
            if (tiles.of[layout] == nullptr) return;
            uint8_t* tile = tiles.of[layout] + start * row_bytes(layout, k) + count * row_bytes(layout, part.first);
            function(args.x + start * args.ldx + part.first, args.ldx, part.last - part.first,
                     static_cast<int>(count), static_cast<int>(part.first_row), static_cast<int>(part.last_row), tile);
        };
        lay_out_with(use.kernels->quantize, quantized);
        if (use.bf16 != nullptr) lay_out_with(use.bf16->lay_out, bf16);
        if (tiles.of[dense] != nullptr) {
            uint8_t* tile = tiles.of[dense] + start * dense_row_bytes(k);
            lay_out_dense(args, start, count, part, reinterpret_cast<float*>(tile));
        }
    }
}

auto kernel_of(const LinearPart& part, const Selection& use, int64_t rows) {
    const Layout layout = layout_of(part, use);
    if (layout == bf16) return use.bf16->multiply;
    const bool has_tiles = layout == quantized && use.tile_kernels != nullptr && rows >= min_tile_rows;
    return (has_tiles ? use.tile_kernels : use.kernels)->multiply[static_cast<int>(part.format)];
}

// Groups [first, last) of one part, chunk of rows by chunk of rows.
void multiply_groups(const MatmulArgs& args, const Selection& use, const Tiles& tiles, const LinearPart& part,
                     int64_t column, int64_t first, int64_t last) {
    const int64_t k = args.linear->k;
    const Layout layout = layout_of(part, use);
    const int64_t bytes = row_bytes(layout, k);
    const int64_t start = first * group_rows;
    const int64_t end = last * group_rows < part.n ? last * group_rows : part.n;
    int64_t chunk = use.chunk_bytes / bytes / tile_rows * tile_rows;
    if (chunk < tile_rows) chunk = tile_rows;
    for (int64_t row = 0; row < args.rows; row += chunk) {
        MatmulWork work;
        work.packed = part.packed + first * group_bytes(part.format, k);
        work.columns = end - start;
        work.k = k;
        work.tiles = tiles.of[layout] + row * bytes;
        work.rows = args.rows - row < chunk ? args.rows - row : chunk;
        work.bias = part.bias == nullptr ? nullptr : part.bias + start;
        work.y = args.y + row * args.ldy + column + start;
        work.ldy = args.ldy;
        kernel_of(part, use, work.rows)(work);
    }
}

// Divides the call's workspace, or this thread's part of it, between the layouts.
Tiles place_tiles(const MatmulArgs& args, const Selection& use, int thread) {
    const Linear& linear = *args.linear;
    int64_t bytes[num_layouts] = {};
    for (int i = 0; i < linear.num_parts; ++i) {
        const Layout layout = layout_of(linear.parts[i], use);
        bytes[layout] = align(args.rows * row_bytes(layout, linear.k));
    }
    uint8_t* at = args.workspace + thread * (bytes[quantized] + bytes[dense] + bytes[bf16]);
    Tiles tiles;
    for (int layout = 0; layout < num_layouts; ++layout) {
        tiles.of[layout] = bytes[layout] > 0 ? at : nullptr;
        at += bytes[layout];
    }
    return tiles;
}

}  // namespace

int64_t matmul_workspace(int64_t k, int64_t max_rows, int num_threads) {
    const int64_t all_layouts = (k + 31) / 32 * quantized_block_bytes + dense_row_bytes(k) + bf16_row_bytes(k);
    const auto tile_bytes = [&](int64_t rows) { return align(rows * all_layouts + 64 * num_layouts); };
    const int64_t private_rows = max_rows * k <= max_private_values ? max_rows : max_private_values / k;
    return tile_bytes(max_rows) + num_threads * tile_bytes(private_rows);
}

void matmul(const MatmulArgs& args, const Team& team) {
    const Linear& linear = *args.linear;
    const Selection use = selection();
    const bool is_private = args.rows * linear.k <= max_private_values;
    const Tiles tiles = place_tiles(args, use, is_private ? team.thread : 0);
    if (is_private) {
        lay_out(args, use, tiles, {0, args.rows, 0, linear.k});
    } else {
        lay_out(args, use, tiles, range_of(args, team));
        team.barrier();
    }

    // Threads share the bytes of the weights evenly, in whole groups.
    int64_t total = 0;
    for (int i = 0; i < linear.num_parts; ++i) {
        total += num_groups(linear.parts[i].n) * group_bytes(linear.parts[i].format, linear.k);
    }
    const int64_t from = total * team.thread / team.num_threads;
    const int64_t to = total * (team.thread + 1) / team.num_threads;
    int64_t offset = 0, column = 0;
    for (int i = 0; i < linear.num_parts; ++i) {
        const LinearPart& part = linear.parts[i];
        const int64_t bytes = group_bytes(part.format, linear.k);
        const int64_t groups = num_groups(part.n);
        const auto index = [&](int64_t position) {  // the first group at or after `position`
            const int64_t group = (position - offset + bytes - 1) / bytes;
            return position <= offset ? 0 : group < groups ? group : groups;
        };
        if (index(from) < index(to)) multiply_groups(args, use, tiles, part, column, index(from), index(to));
        offset += groups * bytes;
        column += part.n;
    }
}

void embedding(const LinearPart& table, int64_t k, const int32_t* ids, int64_t count, float scale, float* y,
               int64_t ldy, const Team& team) {
    int64_t first, last;
    share(team, count, 1, &first, &last);
    for (int64_t i = first; i < last; ++i) unpack_row(table.format, table.packed, k, ids[i], scale, y + i * ldy);
}

}  // namespace turbolm

#define TURBOLM_EXPORT extern "C" __attribute__((visibility("default")))

using namespace turbolm;

// Bytes of a packed matrix.
TURBOLM_EXPORT int64_t turbolm_pack_size(int32_t format, int64_t n, int64_t k) {
    return num_groups(n) * group_bytes(static_cast<Format>(format), k);
}

// Packs groups [first, last) of 16 rows; `source` is row 16 * first, `target` the matrix's first byte.
TURBOLM_EXPORT void turbolm_pack(int32_t format, const uint8_t* source, int64_t n, int64_t k, int64_t first,
                                 int64_t last, uint8_t* target) {
    const auto f = static_cast<Format>(format);
    pack_groups(f, source, n, k, first, last, target + first * group_bytes(f, k));
}

TURBOLM_EXPORT int64_t turbolm_matmul_workspace(int64_t k, int64_t max_rows, int32_t num_threads) {
    return matmul_workspace(k, max_rows, num_threads);
}
