#include "matmul.h"

#include "isa.h"

namespace turbolm {
namespace {

// Inputs of at most this many values are laid out by every thread for itself: cheaper than a barrier.
constexpr int64_t max_private_values = 2048;
// Bytes of quantized rows that stay in a core's second-level cache while the weights stream by.
constexpr int64_t chunk_bytes = 384 << 10;

// The kernels for the instruction set in use.
const MatmulKernels& matmul_kernels() {
    [[maybe_unused]] const Isa best = isa();
#if defined(TURBOLM_BUILD_AVX512VNNI)
    if (best >= Isa::avx512vnni) return matmul_avx512vnni;
#endif
#if defined(TURBOLM_BUILD_AVX512)
    if (best >= Isa::avx512) return matmul_avx512;
#endif
#if defined(TURBOLM_BUILD_AVX2)
    if (best >= Isa::avx2) return matmul_avx2;
#endif
#if defined(TURBOLM_BUILD_NEON)
    if (best == Isa::neon) return matmul_neon;
#endif
    return matmul_generic;
}

bool is_dense(const LinearPart& part) { return format_layout(part.format).is_dense; }

bool has_parts(const Linear& linear, bool dense) {
    for (int i = 0; i < linear.num_parts; ++i) {
        if (is_dense(linear.parts[i]) == dense) return true;
    }
    return false;
}

int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where a call keeps its input, in the layouts that its parts read.
struct Tiles {
    uint8_t* quantized;
    uint8_t* dense;
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
void lay_out(const MatmulArgs& args, const Tiles& tiles, const Range& range) {
    const int64_t k = args.linear->k;
    for (int64_t start = range.first_row / tile_rows * tile_rows; start < range.last_row; start += tile_rows) {
        const int64_t count = args.rows - start < tile_rows ? args.rows - start : tile_rows;
        Range part = range;  // rows of the tile
        part.first_row = range.first_row > start ? range.first_row - start : 0;
        part.last_row = range.last_row - start < count ? range.last_row - start : count;
        if (tiles.quantized != nullptr) {
            uint8_t* tile = tiles.quantized + start * quantized_row_bytes(k);
            matmul_kernels().quantize(args.x + start * args.ldx + part.first, args.ldx, part.last - part.first,
                                      static_cast<int>(count), static_cast<int>(part.first_row),
                                      static_cast<int>(part.last_row),
                                      tile + quantized_row_bytes(part.first) * count);
        }
        if (tiles.dense != nullptr) {
            uint8_t* tile = tiles.dense + start * dense_row_bytes(k);
            lay_out_dense(args, start, count, part, reinterpret_cast<float*>(tile));
        }
    }
}

// Groups [first, last) of one part, chunk of rows by chunk of rows.
void multiply_groups(const MatmulArgs& args, const Tiles& tiles, const LinearPart& part, int64_t column, int64_t first,
                     int64_t last) {
    const int64_t k = args.linear->k;
    const int64_t row_bytes = is_dense(part) ? dense_row_bytes(k) : quantized_row_bytes(k);
    const uint8_t* input = is_dense(part) ? tiles.dense : tiles.quantized;
    const int64_t start = first * group_rows;
    const int64_t end = last * group_rows < part.n ? last * group_rows : part.n;
    int64_t chunk = chunk_bytes / row_bytes / tile_rows * tile_rows;
    if (chunk < tile_rows) chunk = tile_rows;
    for (int64_t row = 0; row < args.rows; row += chunk) {
        MatmulWork work;
        work.packed = part.packed + first * group_bytes(part.format, k);
        work.columns = end - start;
        work.k = k;
        work.tiles = input + row * row_bytes;
        work.rows = args.rows - row < chunk ? args.rows - row : chunk;
        work.bias = part.bias == nullptr ? nullptr : part.bias + start;
        work.y = args.y + row * args.ldy + column + start;
        work.ldy = args.ldy;
        matmul_kernels().multiply[static_cast<int>(part.format)](work);
    }
}

}  // namespace

int64_t matmul_workspace(int64_t k, int64_t max_rows, int num_threads) {
    const int64_t row_bytes = (k + 31) / 32 * quantized_block_bytes + dense_row_bytes(k);
    const int64_t shared = align(max_rows * row_bytes + 128);
    const int64_t private_rows = max_rows * k <= max_private_values ? max_rows : max_private_values / k;
    return shared + num_threads * align(private_rows * row_bytes + 128);
}

void matmul(const MatmulArgs& args, const Team& team) {
    const Linear& linear = *args.linear;
    const bool is_private = args.rows * linear.k <= max_private_values;
    const int64_t quantized_bytes = has_parts(linear, false) ? align(args.rows * quantized_row_bytes(linear.k)) : 0;
    const int64_t dense_bytes = has_parts(linear, true) ? align(args.rows * dense_row_bytes(linear.k)) : 0;
    uint8_t* base = args.workspace + (is_private ? team.thread * (quantized_bytes + dense_bytes) : 0);
    const Tiles tiles{quantized_bytes > 0 ? base : nullptr, dense_bytes > 0 ? base + quantized_bytes : nullptr};
    if (is_private) {
        lay_out(args, tiles, {0, args.rows, 0, linear.k});
    } else {
        lay_out(args, tiles, range_of(args, team));
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
        if (index(from) < index(to)) multiply_groups(args, tiles, part, column, index(from), index(to));
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
