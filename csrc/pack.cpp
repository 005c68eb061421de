#include "pack.h"

#include <bit>
#include <cstring>

namespace turbolm {
namespace {

constexpr int rows = group_rows;

constexpr FormatLayout layouts[num_formats] = {
    {1, 4, 64, true},            // f32
    {1, 2, 32, true},            // f16
    {2, 4, 64, true},            // bf16
    {32, 18, 288, false},        // q4_0
    {32, 20, 320, false},        // q4_1
    {32, 22, 352, false},        // q5_0
    {32, 24, 384, false},        // q5_1
    {32, 34, 544, false},        // q8_0
    {32, 18, 288, false},        // iq4_nl
    {256, 144, 2368, false},     // q4_k
    {256, 176, 2880, false},     // q5_k
    {256, 210, 3360, false},     // q6_k
    {256, 136, 2208, false},     // iq4_xs
    {256, 84, 1344, false},      // q2_k
    {256, 110, 1824, false},     // q3_k
};

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31;
    const uint32_t mantissa = half & 1023;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

float half_at(const uint8_t* data, int index) {
    uint16_t half;
    std::memcpy(&half, data + 2 * index, 2);
    return half_to_float(half);
}

uint32_t word_at(const uint8_t* data, int index) {
    uint32_t word;
    std::memcpy(&word, data + 4 * index, 4);
    return word;
}

void put_word(uint8_t* target, int row, uint32_t word) { std::memcpy(target + 4 * row, &word, 4); }

void put_half(uint8_t* target, int row, const uint8_t* half) { std::memcpy(target + 2 * row, half, 2); }

// 16 bytes of nibbles, low ones first (values 0..15, then 16..31 in the high nibbles).
void put_nibbles(uint8_t* quads, int row, const uint8_t* nibbles) {
    for (int quad = 0; quad < 4; ++quad) put_word(quads + 64 * quad, row, word_at(nibbles, quad));
}

// The highest bits of 32 values: bit i of `bits` to bit i / 4 of byte i % 4.
void put_high_bits(uint8_t* target, int row, uint32_t bits) {
    uint32_t result = 0;
    for (int quad = 0; quad < 8; ++quad) {
        const uint32_t nibble = (bits >> (4 * quad)) & 15;
        result |= ((nibble * 0x00204081u) & 0x01010101u) << quad;  // one bit to each byte
    }
    put_word(target, row, result);
}

// Bit `index` of each of 32 bytes, as the highest bits of 32 values.
void put_bits_of_bytes(uint8_t* target, int row, const uint8_t* bytes, int index) {
    uint32_t bits = 0;
    for (int quad = 0; quad < 8; ++quad) bits |= ((word_at(bytes, quad) >> index) & 0x01010101u) << quad;
    put_word(target, row, bits);
}

// Two bits of each of 32 bytes, from bit `shift` on, to four quads in each of two lines.
void put_bit_pairs(uint8_t* target, int row, const uint8_t* source, int shift) {
    for (int half = 0; half < 2; ++half) {
        uint32_t bits = 0;
        for (int quad = 0; quad < 4; ++quad) {
            bits |= ((word_at(source, 4 * half + quad) >> shift) & 0x03030303u) << (2 * quad);
        }
        put_word(target + 64 * half, row, bits);
    }
}

// The 6-bit scale and minimum of sub-block `index` of a q4_k or q5_k block.
void read_scale_min(const uint8_t* packed, int index, uint8_t* scale, uint8_t* minimum) {
    if (index < 4) {
        *scale = packed[index] & 63;
        *minimum = packed[index + 4] & 63;
    } else {
        *scale = static_cast<uint8_t>((packed[index + 4] & 15) | (packed[index - 4] >> 6) << 4);
        *minimum = static_cast<uint8_t>((packed[index + 4] >> 4) | (packed[index] >> 6) << 4);
    }
}

// Nibbles of two sub-blocks of 32, one in the low and one in the high nibbles of 32 bytes: picks
// one and lays it out as 16 bytes of nibbles.
void gather_nibbles(const uint8_t* source, bool high, uint8_t* nibbles) {
    const int shift = high ? 4 : 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t low_values = (word_at(source, i) >> shift) & 0x0f0f0f0fu;
        const uint32_t high_values = (word_at(source, i + 4) >> shift) & 0x0f0f0f0fu;
        put_word(nibbles, i, low_values | high_values << 4);
    }
}

void pack_q4_0(const uint8_t* source, int row, uint8_t* target) {  // iq4_nl too
    put_half(target, row, source);
    put_nibbles(target + 32, row, source + 2);
}

void pack_q4_1(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source);
    put_half(target + 32, row, source + 2);
    put_nibbles(target + 64, row, source + 4);
}

void pack_q5_0(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source);
    put_nibbles(target + 32, row, source + 6);
    put_high_bits(target + 288, row, word_at(source + 2, 0));
}

void pack_q5_1(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source);
    put_half(target + 32, row, source + 2);
    put_nibbles(target + 64, row, source + 8);
    put_high_bits(target + 320, row, word_at(source, 1));
}

void pack_q8_0(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source);
    for (int quad = 0; quad < 8; ++quad) {
        put_word(target + 32 + 64 * quad, row, word_at(source + 2, quad) ^ 0x80808080u);  // value + 128
    }
}

void pack_q4_k(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source);
    put_half(target + 32, row, source + 2);
    for (int sub = 0; sub < 8; ++sub) {
        uint8_t* to = target + 64 + 288 * sub;
        uint8_t nibbles[16];
        read_scale_min(source + 4, sub, to + row, to + 16 + row);
        gather_nibbles(source + 16 + 32 * (sub / 2), sub % 2, nibbles);
        put_nibbles(to + 32, row, nibbles);
    }
}

void pack_q5_k(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source);
    put_half(target + 32, row, source + 2);
    for (int sub = 0; sub < 8; ++sub) {
        uint8_t* to = target + 64 + 352 * sub;
        uint8_t nibbles[16];
        read_scale_min(source + 4, sub, to + row, to + 16 + row);
        gather_nibbles(source + 48 + 32 * (sub / 2), sub % 2, nibbles);
        put_nibbles(to + 32, row, nibbles);
        put_bits_of_bytes(to + 288, row, source + 16, sub);
    }
}

// q6_k: halves of 128 values; value 32*j + i of a half has its low nibble in low[32*(j%2) + i]
// (high half of the byte for j >= 2) and its two high bits in high[i] >> 2*j.
void pack_q6_k(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source + 208);
    for (int sub = 0; sub < 8; ++sub) {
        const uint8_t* low = source + 64 * (sub / 4) + 32 * (sub % 2);
        uint8_t* to = target + 32 + 416 * sub;
        uint8_t nibbles[16];
        to[row] = source[192 + 2 * sub];
        to[16 + row] = source[192 + 2 * sub + 1];
        gather_nibbles(low, sub % 4 >= 2, nibbles);
        put_nibbles(to + 32, row, nibbles);
        put_bit_pairs(to + 288, row, source + 128 + 32 * (sub / 4), 2 * (sub % 4));
    }
}

// q2_k: halves of 128 values; value 32*j + i of a half is in bits 2*j, 2*j + 1 of its byte i.
void pack_q2_k(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source + 80);
    put_half(target + 32, row, source + 82);
    for (int sub = 0; sub < 8; ++sub) {
        uint8_t* to = target + 64 + 160 * sub;
        to[row] = source[2 * sub];
        to[16 + row] = source[2 * sub + 1];
        put_bit_pairs(to + 32, row, source + 16 + 32 * (sub / 4), 2 * (sub % 4));
    }
}

// The 6-bit scale (plus 32) of 16 values of a q3_k block: low four bits, then high two.
uint8_t q3_scale(const uint8_t* packed, int index) {
    const int low = (packed[index % 8] >> (4 * (index / 8))) & 15;
    const int high = (packed[8 + index % 4] >> (2 * (index / 4))) & 3;
    return static_cast<uint8_t>((low | high << 4) - 32);
}

// q3_k: the low two bits as in q2_k; bit `sub` of byte i of the first 32 is the highest of value i.
void pack_q3_k(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source + 108);
    for (int sub = 0; sub < 8; ++sub) {
        uint8_t* to = target + 32 + 224 * sub;
        to[row] = q3_scale(source + 96, 2 * sub);
        to[16 + row] = q3_scale(source + 96, 2 * sub + 1);
        put_bit_pairs(to + 32, row, source + 32 + 32 * (sub / 4), 2 * (sub % 4));
        put_bits_of_bytes(to + 160, row, source, sub);
    }
}

void pack_iq4_xs(const uint8_t* source, int row, uint8_t* target) {
    put_half(target, row, source);
    uint16_t scales_high;
    std::memcpy(&scales_high, source + 2, 2);
    for (int sub = 0; sub < 8; ++sub) {
        uint8_t* to = target + 32 + 272 * sub;
        const int low = (source[4 + sub / 2] >> (4 * (sub % 2))) & 15;
        const int high = (scales_high >> (2 * sub)) & 3;
        to[row] = static_cast<uint8_t>((low | high << 4) - 32);
        put_nibbles(to + 16, row, source + 8 + 16 * sub);
    }
}

void pack_block(Format format, const uint8_t* source, int row, uint8_t* target) {
    switch (format) {
        case Format::f32: std::memcpy(target + 4 * row, source, 4); break;
        case Format::f16: std::memcpy(target + 2 * row, source, 2); break;
        case Format::bf16: std::memcpy(target + 4 * row, source, 4); break;
        case Format::q4_0:
        case Format::iq4_nl: pack_q4_0(source, row, target); break;
        case Format::q4_1: pack_q4_1(source, row, target); break;
        case Format::q5_0: pack_q5_0(source, row, target); break;
        case Format::q5_1: pack_q5_1(source, row, target); break;
        case Format::q8_0: pack_q8_0(source, row, target); break;
        case Format::q4_k: pack_q4_k(source, row, target); break;
        case Format::q5_k: pack_q5_k(source, row, target); break;
        case Format::q6_k: pack_q6_k(source, row, target); break;
        case Format::iq4_xs: pack_iq4_xs(source, row, target); break;
        case Format::q2_k: pack_q2_k(source, row, target); break;
        case Format::q3_k: pack_q3_k(source, row, target); break;
    }
}

// --- one packed row back to floats ---

int nibble_at(const uint8_t* quads, int row, int i) {
    const int byte = quads[64 * ((i % 16) / 4) + 4 * row + i % 4];
    return i < 16 ? byte & 15 : byte >> 4;
}

int high_bit_at(const uint8_t* bits, int row, int i) { return (bits[4 * row + i % 4] >> (i / 4)) & 1; }

void unpack_32(Format format, const uint8_t* block, int row, float* out) {
    const bool has_minimum = format == Format::q4_1 || format == Format::q5_1;
    const float d = half_at(block, row);
    const float m = has_minimum ? half_at(block + 32, row) : 0.0f;
    const uint8_t* quads = block + (has_minimum ? 64 : 32);
    for (int i = 0; i < 32; ++i) {
        switch (format) {
            case Format::q4_0: out[i] = d * static_cast<float>(nibble_at(quads, row, i) - 8); break;
            case Format::q4_1: out[i] = d * static_cast<float>(nibble_at(quads, row, i)) + m; break;
            case Format::iq4_nl: out[i] = d * static_cast<float>(iq4_values[nibble_at(quads, row, i)]); break;
            case Format::q8_0:
                out[i] = d * static_cast<float>(quads[64 * (i / 4) + 4 * row + i % 4] - 128);
                break;
            default: {  // q5_0, q5_1
                const int q = nibble_at(quads, row, i) | high_bit_at(quads + 256, row, i) << 4;
                out[i] = has_minimum ? d * static_cast<float>(q) + m : d * static_cast<float>(q - 16);
            }
        }
    }
}

int bit_pair_at(const uint8_t* lines, int row, int i) {
    return (lines[64 * (i / 16) + 4 * row + i % 4] >> (2 * (i % 16 / 4))) & 3;
}

// 32 values with an int8 scale for each half, the first bytes of `from`: q3_k and q6_k.
void unpack_halves(Format format, const uint8_t* from, int row, float d, float* out) {
    for (int i = 0; i < 32; ++i) {
        int q = 0;
        if (format == Format::q6_k) {
            q = (nibble_at(from + 32, row, i) | bit_pair_at(from + 288, row, i) << 4) - 32;
        } else {
            q = (bit_pair_at(from + 32, row, i) | high_bit_at(from + 160, row, i) << 2) - 4;
        }
        out[i] = d * static_cast<float>(static_cast<int8_t>(from[16 * (i / 16) + row])) * static_cast<float>(q);
    }
}

void unpack_q2_k(const uint8_t* from, int row, float d, float dmin, float* out) {
    for (int i = 0; i < 32; ++i) {
        const int factors = from[16 * (i / 16) + row];
        const float minimum = dmin * static_cast<float>(factors >> 4);
        const float scale = d * static_cast<float>(factors & 15);
        out[i] = scale * static_cast<float>(bit_pair_at(from + 32, row, i)) - minimum;
    }
}

void unpack_iq4_xs(const uint8_t* from, int row, float d, float* out) {
    const float scale = d * static_cast<float>(static_cast<int8_t>(from[row]));
    for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(iq4_values[nibble_at(from + 16, row, i)]);
}

void unpack_q4_k(Format format, const uint8_t* from, int row, float d, float dmin, float* out) {  // q5_k too
    const float scale = d * static_cast<float>(from[row]);
    const float minimum = dmin * static_cast<float>(from[16 + row]);
    for (int i = 0; i < 32; ++i) {
        const int high = format == Format::q5_k ? high_bit_at(from + 288, row, i) << 4 : 0;
        out[i] = scale * static_cast<float>(nibble_at(from + 32, row, i) | high) - minimum;
    }
}

void unpack_256(Format format, const uint8_t* block, int row, float* out) {
    const float d = half_at(block, row);
    for (int sub = 0; sub < 8; ++sub, out += 32) {
        switch (format) {
            case Format::q2_k: unpack_q2_k(block + 64 + 160 * sub, row, d, half_at(block + 32, row), out); break;
            case Format::q3_k: unpack_halves(format, block + 32 + 224 * sub, row, d, out); break;
            case Format::q6_k: unpack_halves(format, block + 32 + 416 * sub, row, d, out); break;
            case Format::iq4_xs: unpack_iq4_xs(block + 32 + 272 * sub, row, d, out); break;
            default: {
                const int sub_bytes = format == Format::q5_k ? 352 : 288;
                unpack_q4_k(format, block + 64 + sub_bytes * sub, row, d, half_at(block + 32, row), out);
            }
        }
    }
}

float dense_value(Format format, const uint8_t* group, int row, int64_t i) {
    if (format == Format::f16) return half_at(group + 32 * i, row);
    float value = 0.0f;
    if (format == Format::f32) {
        std::memcpy(&value, group + 64 * i + 4 * row, 4);
    } else {
        uint16_t high;
        std::memcpy(&high, group + 64 * (i / 2) + 4 * row + 2 * (i % 2), 2);
        value = std::bit_cast<float>(static_cast<uint32_t>(high) << 16);
    }
    return value;
}

}  // namespace

const FormatLayout& format_layout(Format format) { return layouts[static_cast<int>(format)]; }

void pack_groups(Format format, const uint8_t* source, int64_t n, int64_t k, int64_t first, int64_t last,
                 uint8_t* target) {
    const FormatLayout& layout = format_layout(format);
    const int64_t blocks = num_blocks(format, k);
    const int64_t row_bytes = k * layout.source_bytes / layout.values;
    const bool has_half_block = blocks * layout.values != k;  // bf16 with odd k
    const int64_t whole_blocks = has_half_block ? blocks - 1 : blocks;
    for (int64_t group = first; group < last; ++group) {
        const int64_t left = n - group * rows;
        const int count = left < rows ? static_cast<int>(left) : rows;
        for (int64_t block = 0; block < blocks; ++block, target += layout.packed_bytes) {
            if (count < rows || block >= whole_blocks) std::memset(target, 0, static_cast<size_t>(layout.packed_bytes));
            for (int row = 0; row < count; ++row) {
                const uint8_t* from = source + row * row_bytes + block * layout.source_bytes;
                if (block < whole_blocks) {
                    pack_block(format, from, row, target);
                } else {
                    std::memcpy(target + 4 * row, from, 2);
                }
            }
        }
        source += rows * row_bytes;
    }
}

void unpack_row(Format format, const uint8_t* packed, int64_t k, int64_t row, float scale, float* target) {
    const FormatLayout& layout = format_layout(format);
    const uint8_t* group = packed + row / rows * group_bytes(format, k);
    const int lane = static_cast<int>(row % rows);
    if (layout.is_dense) {
        for (int64_t i = 0; i < k; ++i) target[i] = dense_value(format, group, lane, i) * scale;
        return;
    }
    for (int64_t done = 0; done < k; done += layout.values, group += layout.packed_bytes) {
        float values[256];
        if (layout.values == 32) {
            unpack_32(format, group, lane, values);
        } else {
            unpack_256(format, group, lane, values);
        }
        for (int i = 0; i < layout.values; ++i) target[done + i] = values[i] * scale;
    }
}

}  // namespace turbolm
