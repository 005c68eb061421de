// Numbers as KV caches keep them: floats of 4, 2 or 1 bytes, and codes of 8 or 4 bits.
//
// A head of one token is coded by itself: value = code * scale + minimum. Attention multiplies codes and
// brings scale and minimum in afterwards, once per key and row of queries, so a code costs what a float16 does.
#pragma once

#include "kernels_math.h"
#include "ops.h"

namespace turbolm {
namespace {

struct Fp8 {  // e4m3 without infinities: at most 448
    uint8_t bits;
};
struct Int8 {
    uint8_t code;
};
struct Int4 {
    uint8_t codes;  // of two numbers, the first in the low half
};

// Numbers in a T.
template <class T>
constexpr int kPerItem = 1;
template <>
constexpr int kPerItem<Int4> = 2;

// What load() gives, times this, is the number (or its code).
constexpr float unit_of(CacheType type) { return type == CacheType::fp8 ? 256.0f : 1.0f; }

constexpr bool is_coded(CacheType type) { return type == CacheType::int8 || type == CacheType::int4; }

constexpr float highest_code(CacheType type) { return type == CacheType::int8 ? 255.0f : 15.0f; }

// Bytes of so many numbers.
constexpr int64_t bytes_of(CacheType type, int64_t count) {
    switch (type) {
        case CacheType::f32: return 4 * count;
        case CacheType::f16:
        case CacheType::bf16: return 2 * count;
        case CacheType::int4: return count / 2;
        default: return count;
    }
}

template <class T>
struct Kept {
    using Item = T;
};

// Calls f with how numbers of this type are kept.
template <class F>
TURBOLM_INLINE void with_type(CacheType type, const F& f) {
    switch (type) {
        case CacheType::f32: return f(Kept<float>{});
        case CacheType::f16: return f(Kept<F16>{});
        case CacheType::bf16: return f(Kept<Bf16>{});
        case CacheType::int8: return f(Kept<Int8>{});
        case CacheType::int4: return f(Kept<Int4>{});
        case CacheType::fp8: return f(Kept<Fp8>{});
    }
}

// 16 items; of two numbers each, the first (half 0) or the second.
template <class T>
TURBOLM_INLINE Vec load_half(const T* p, int) { return load(p); }
TURBOLM_INLINE Vec load_half(const Fp8* p, int) { return Vec::load_fp8(&p->bits); }
TURBOLM_INLINE Vec load_half(const Int8* p, int) { return Vec::load_u8(&p->code); }
TURBOLM_INLINE Vec load_half(const Int4* p, int half) { return Vec::load_u4(&p->codes, half); }

TURBOLM_INLINE float round_to_f16(float x) {
    F16 rounded[kLanes];
    store(Vec::all(x), rounded);
    float lanes[kLanes];
    store(load(rounded), lanes);
    return lanes[0];
}

// To nearest even; beyond 448 it stays there, NaN stays NaN.
TURBOLM_INLINE uint8_t to_fp8(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 24 & 0x80;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<uint8_t>(sign | 0x7f);
    if (bits > 0x43e00000) bits = 0x43e00000;
    if (bits < 0x3c800000) {  // subnormal, a multiple of 2^-9: let the addition round
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, 4);
        const float rounded = magnitude + 0x1p14f;
        uint32_t rounded_bits;
        __builtin_memcpy(&rounded_bits, &rounded, 4);
        return static_cast<uint8_t>(sign | (rounded_bits - 0x46800000));
    }
    return static_cast<uint8_t>(sign | ((bits - 0x3c000000 + 0x7ffff + (bits >> 20 & 1)) >> 20));
}

// How a head of one token is coded.
struct Range {
    float scale, minimum, highest_code;
};

TURBOLM_INLINE Range range_of(const float* x, int count, float highest_code) {
    Vec high = Vec::all(-kInfinity), low = high;  // of x and of -x
    const Vec none = high;
    for (int i = 0; i < count; i += kLanes) {
        const int rest = count - i < kLanes ? count - i : kLanes;
        const Vec value = Vec::load_first(x + i, rest);
        high = Vec::max(high, Vec::between(value, 0, rest, none));
        low = Vec::max(low, Vec::between(Vec::zero() - value, 0, rest, none));
    }
    const float minimum = -largest(low);
    return {round_to_f16((largest(high) - minimum) / highest_code), round_to_f16(minimum), highest_code};
}

// Scale and minimum, in float16.
TURBOLM_INLINE Range read_range(const uint16_t* values, float highest_code) {
    F16 items[kLanes] = {{values[0]}, {values[1]}};
    float lanes[kLanes];
    store(load(items), lanes);
    return {lanes[0], lanes[1], highest_code};
}

// Codes of up to 16 numbers.
TURBOLM_INLINE void encode(const float* x, int count, const Range& range, uint8_t* codes) {
    const Vec scaled = (Vec::load_first(x, count) - Vec::all(range.minimum)) / Vec::all(range.scale);
    const Vec top = Vec::all(range.highest_code), bounded = Vec::max(scaled, Vec::zero());
    float lanes[kLanes];
    store(Vec::round(Vec::if_less(top, bounded, top, bounded)), lanes);
    for (int i = 0; i < kLanes; ++i) codes[i] = static_cast<uint8_t>(static_cast<int>(lanes[i]));
}

// Up to 16 numbers as items.
template <class T>
TURBOLM_INLINE void pack_items(const float* x, int count, const Range&, T* items) {
    store(Vec::load_first(x, count), items);
}
TURBOLM_INLINE void pack_items(const float* x, int count, const Range&, Fp8* items) {
    for (int i = 0; i < count; ++i) items[i].bits = to_fp8(x[i]);
}
TURBOLM_INLINE void pack_items(const float* x, int count, const Range& range, Int8* items) {
    encode(x, count, range, &items->code);
}
// As many numbers from `second` are in the items' other half.
TURBOLM_INLINE void pack_pairs(const float* first, const float* second, int count, const Range& range, Int4* items) {
    uint8_t low[kLanes], high[kLanes];
    encode(first, count, range, low);
    encode(second, count, range, high);
    for (int i = 0; i < count; ++i) items[i].codes = static_cast<uint8_t>(low[i] | high[i] << 4);
}

}  // namespace
}  // namespace turbolm
