// Vec: 16 floats, left to the compiler.
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

struct Vec {
    float lane[16];

    static constexpr int block_rows = 2, block_columns = 1;

    template <class F>
    static Vec each(const F& f) {
        Vec r;
        for (int i = 0; i < 16; ++i) r.lane[i] = f(i);
        return r;
    }
    static Vec zero() { return all(0.0f); }
    static Vec all(float x) {
        return each([=](int) { return x; });
    }
    static Vec load(const float* p) {
        Vec r;
        std::memcpy(r.lane, p, sizeof r.lane);
        return r;
    }
    static Vec load_f16(const uint16_t* p) {
        return each([=](int i) { return half_to_float(p[i]); });
    }
    static Vec load_bf16(const uint16_t* p) {
        return each([=](int i) {
            const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            return value;
        });
    }
    static Vec load_first(const float* p, int n) {
        return each([=](int i) { return i < n ? p[i] : 0.0f; });
    }
    void store(float* p) const { std::memcpy(p, lane, sizeof lane); }
    void store_first(float* p, int n) const {
        for (int i = 0; i < n && i < 16; ++i) p[i] = lane[i];
    }
    void store_f16(uint16_t* p) const {
        for (int i = 0; i < 16; ++i) p[i] = float_to_half(lane[i]);
    }
    void store_bf16(uint16_t* p) const {
        for (int i = 0; i < 16; ++i) {
            uint32_t bits;
            std::memcpy(&bits, &lane[i], 4);
            p[i] = lane[i] != lane[i] ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
    static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
        return each([&](int i) {
#if defined(__FP_FAST_FMAF)
            return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
#else
            return a.lane[i] * b.lane[i] + c.lane[i];
#endif
        });
    }
    static Vec max(const Vec& a, const Vec& b) {
        return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static Vec round(const Vec& a) {  // |a| < 2^22
        return each([&](int i) { return (a.lane[i] + 0x1.8p23f) - 0x1.8p23f; });
    }
    static Vec scale(const Vec& x, const Vec& n) {
        return each([&](int i) {
            const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23;
            float power;
            std::memcpy(&power, &bits, 4);
            return x.lane[i] * power;
        });
    }
    static Vec magnitude(const Vec& a) {
        return each([&](int i) { return __builtin_fabsf(a.lane[i]); });
    }
    static Vec if_less(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {
        return each([&](int i) { return a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]; });
    }
    static Vec between(const Vec& a, int low, int high, const Vec& other) {
        return each([&](int i) { return low <= i && i < high ? a.lane[i] : other.lane[i]; });
    }
};

inline Vec operator+(const Vec& a, const Vec& b) {
    return Vec::each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec operator-(const Vec& a, const Vec& b) {
    return Vec::each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec operator*(const Vec& a, const Vec& b) {
    return Vec::each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec operator/(const Vec& a, const Vec& b) {
    return Vec::each([&](int i) { return a.lane[i] / b.lane[i]; });
}

}  // namespace
}  // namespace turbolm
