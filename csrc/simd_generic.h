// Vec: 16 floats as a vector type of GCC and Clang, which they split into what the processor has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace turbolm {
namespace {

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
        bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x400) {
        bits = (magnitude << 13) + 0x38000000;
    } else {
        const float value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal
        std::memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline uint16_t float_to_half(float value) {  // to nearest even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    if (bits < 0x38800000) {                       // subnormal: let the addition round
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        const float rounded = magnitude + 0.5f;
        uint32_t rounded_bits;
        std::memcpy(&rounded_bits, &rounded, 4);
        return static_cast<uint16_t>(sign | (rounded_bits - 0x3f000000));
    }
    const uint32_t odd = bits >> 13 & 1;
    return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + odd) >> 13));
}

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

template <class To, class From>
inline To reinterpret(const From& from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct Vec {
    Floats value;

    static constexpr int block_rows = 2, block_columns = 1;

    static Vec zero() { return {Floats{}}; }
    static Vec all(float x) { return {Floats{} + x}; }
    static Vec load(const float* p) {
        Vec r;
        std::memcpy(&r.value, p, sizeof r.value);
        return r;
    }
    static Vec load_f16(const uint16_t* p) {
        float lanes[16];
        for (int i = 0; i < 16; ++i) lanes[i] = half_to_float(p[i]);
        return load(lanes);
    }
    static Vec load_bf16(const uint16_t* p) {
        uint32_t lanes[16];
        for (int i = 0; i < 16; ++i) lanes[i] = static_cast<uint32_t>(p[i]) << 16;
        return {reinterpret<Floats>(lanes)};
    }
    static Vec load_u8(const uint8_t* p) {
        float lanes[16];
        for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(p[i]);
        return load(lanes);
    }
    static Vec load_u4(const uint8_t* p, int half) {
        float lanes[16];
        for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(p[i] >> 4 * half & 15);
        return load(lanes);
    }
    static Vec load_fp8(const uint8_t* p) {
        uint16_t halves[16];
        for (int i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
        return load_f16(halves);
    }
    static Vec load_first(const float* p, int n) {
        float lanes[16] = {};
        for (int i = 0; i < n && i < 16; ++i) lanes[i] = p[i];
        return load(lanes);
    }
    void store(float* p) const { std::memcpy(p, &value, sizeof value); }
    void store_first(float* p, int n) const {
        for (int i = 0; i < n && i < 16; ++i) p[i] = value[i];
    }
    void store_f16(uint16_t* p) const {
        for (int i = 0; i < 16; ++i) p[i] = float_to_half(value[i]);
    }
    void store_bf16(uint16_t* p) const {  // to nearest even; NaN stays NaN
        const Bits bits = reinterpret<Bits>(value);
        const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        for (int i = 0; i < 16; ++i) p[i] = value[i] != value[i] ? 0x7fc0 : static_cast<uint16_t>(rounded[i]);
    }
    static Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)
        Vec r;
        for (int i = 0; i < 16; ++i) r.value[i] = __builtin_fmaf(a.value[i], b.value[i], c.value[i]);
        return r;
#else
        return {a.value * b.value + c.value};
#endif
    }
    static Vec max(Vec a, Vec b) { return {a.value > b.value ? a.value : b.value}; }
    static Vec round(Vec a) { return {(a.value + 0x1.8p23f) - 0x1.8p23f}; }  // |a| < 2^22
    static Vec scale(Vec x, Vec n) {
        const Ints exponent = __builtin_convertvector(n.value, Ints) + 127;
        return {x.value * reinterpret<Floats>(exponent << 23)};
    }
    static Vec magnitude(Vec a) { return {reinterpret<Floats>(reinterpret<Bits>(a.value) & 0x7fffffff)}; }
    static Vec if_less(Vec a, Vec b, Vec yes, Vec no) { return {a.value < b.value ? yes.value : no.value}; }
    static float sum(Vec a) {
        float lane[16];
        a.store(lane);
        for (int width = 8; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
        }
        return lane[0];
    }
    static float largest(Vec a) {
        float lane[16];
        a.store(lane);
        for (int width = 8; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
        }
        return lane[0];
    }
    static Vec between(Vec a, int low, int high, Vec other) {
        const Ints index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return {(index >= low) & (index < high) ? a.value : other.value};
    }
};

inline Vec operator+(Vec a, Vec b) { return {a.value + b.value}; }
inline Vec operator-(Vec a, Vec b) { return {a.value - b.value}; }
inline Vec operator*(Vec a, Vec b) { return {a.value * b.value}; }
inline Vec operator/(Vec a, Vec b) { return {a.value / b.value}; }

}  // namespace
}  // namespace turbolm
