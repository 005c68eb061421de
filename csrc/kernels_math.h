// Functions of vectors, and numbers as KV caches store them. Included after a simd_<isa>.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define TURBOLM_INLINE inline __attribute__((always_inline))

namespace turbolm {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kLanes = 16;

struct F16 {
    uint16_t bits;
};
struct Bf16 {
    uint16_t bits;
};

TURBOLM_INLINE Vec load(const float* p) { return Vec::load(p); }
TURBOLM_INLINE Vec load(const F16* p) { return Vec::load_f16(&p->bits); }
TURBOLM_INLINE Vec load(const Bf16* p) { return Vec::load_bf16(&p->bits); }
TURBOLM_INLINE void store(Vec x, float* p) { x.store(p); }
TURBOLM_INLINE void store(Vec x, F16* p) { x.store_f16(&p->bits); }
TURBOLM_INLINE void store(Vec x, Bf16* p) { x.store_bf16(&p->bits); }

// The first n (1 .. 16) numbers; the other lanes are 0.
template <class T>
TURBOLM_INLINE Vec load_first(const T* p, int n) {
    T buffer[kLanes] = {};
    __builtin_memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}
TURBOLM_INLINE Vec load_first(const float* p, int n) { return Vec::load_first(p, n); }

// Sum of the lanes, always in the same order: the upper half is added to the lower, until one is left.
TURBOLM_INLINE float sum(Vec x) { return Vec::sum(x); }

// By the same halves.
TURBOLM_INLINE float largest(Vec x) { return Vec::largest(x); }

// e^x to about 1 ulp: e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by a polynomial (Cephes' expf).
// Below -87.33 (the smallest normal float) it is 0, above 88.37 it stays where it is.
TURBOLM_INLINE Vec exp(Vec x) {
    const Vec low = Vec::all(-87.33f), high = Vec::all(88.37f);
    const Vec bounded = Vec::if_less(high, x, high, Vec::if_less(x, low, low, x));
    const Vec n = Vec::round(bounded * Vec::all(1.44269504f));
    Vec r = Vec::fma(n, Vec::all(-0.693359375f), bounded);
    r = Vec::fma(n, Vec::all(2.12194440e-4f), r);
    Vec p = Vec::all(1.9875691500e-4f);
    p = Vec::fma(p, r, Vec::all(1.3981999507e-3f));
    p = Vec::fma(p, r, Vec::all(8.3334519073e-3f));
    p = Vec::fma(p, r, Vec::all(4.1665795894e-2f));
    p = Vec::fma(p, r, Vec::all(1.6666665459e-1f));
    p = Vec::fma(p, r, Vec::all(5.0000001201e-1f));
    p = Vec::fma(p, r * r, r + Vec::all(1.0f));
    return Vec::if_less(x, low, Vec::zero(), Vec::scale(p, n));
}

TURBOLM_INLINE Vec sigmoid(Vec x) { return Vec::all(1.0f) / (Vec::all(1.0f) + exp(Vec::zero() - x)); }

// Absolute error about 1e-7.
TURBOLM_INLINE Vec tanh(Vec x) {
    return Vec::all(1.0f) - Vec::all(2.0f) / (exp(x + x) + Vec::all(1.0f));
}

TURBOLM_INLINE Vec cap(Vec x, float limit) { return Vec::all(limit) * tanh(x / Vec::all(limit)); }

// Complementary error function of x >= 0, to 2e-7 of itself (Chebyshev fit of Numerical Recipes, 6.2).
TURBOLM_INLINE Vec erfc(Vec x) {
    const Vec t = Vec::all(1.0f) / Vec::fma(Vec::all(0.5f), x, Vec::all(1.0f));
    Vec p = Vec::all(0.17087277f);
    p = Vec::fma(p, t, Vec::all(-0.82215223f));
    p = Vec::fma(p, t, Vec::all(1.48851587f));
    p = Vec::fma(p, t, Vec::all(-1.13520398f));
    p = Vec::fma(p, t, Vec::all(0.27886807f));
    p = Vec::fma(p, t, Vec::all(-0.18628806f));
    p = Vec::fma(p, t, Vec::all(0.09678418f));
    p = Vec::fma(p, t, Vec::all(0.37409196f));
    p = Vec::fma(p, t, Vec::all(1.00002368f));
    p = Vec::fma(p, t, Vec::all(-1.26551223f));
    return t * exp(p - x * x);
}

struct Silu {
    static TURBOLM_INLINE Vec apply(Vec x) { return x * sigmoid(x); }
};
struct Gelu {  // x Φ(x)
    static TURBOLM_INLINE Vec apply(Vec x) {
        const Vec tail = Vec::all(0.5f) * erfc(Vec::magnitude(x) * Vec::all(0.70710678f));
        return x * Vec::if_less(x, Vec::zero(), tail, Vec::all(1.0f) - tail);
    }
};
struct GeluTanh {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    static TURBOLM_INLINE Vec apply(Vec x) {
        const Vec cubic = Vec::fma(x * x * Vec::all(0.044715f), x, x);
        return x * sigmoid(cubic * Vec::all(1.59576912f));  // 2 sqrt(2 / pi)
    }
};

}  // namespace
}  // namespace turbolm
