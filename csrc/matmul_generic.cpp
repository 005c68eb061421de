// Portable kernels, in plain C++ that compilers turn into whatever vectors the target always has.

#include "matmul.h"

namespace turbolm {
namespace {

struct Vector {
    static constexpr int lanes = 4;
    static constexpr int row_steps[] = {4, 2, 1};
    struct Float {
        float of[lanes];
    };
    struct Int {
        int32_t of[lanes];
    };
    struct Bytes {
        uint8_t of[4 * lanes];
    };

    template <class Function>
    static Float each(Function function) {
        Float result;
        for (int i = 0; i < lanes; ++i) result.of[i] = function(i);
        return result;
    }
    template <class Function>
    static Bytes each_byte(Function function) {
        Bytes result;
        for (int i = 0; i < 4 * lanes; ++i) result.of[i] = static_cast<uint8_t>(function(i));
        return result;
    }

    static Float zero() { return set(0.0f); }
    static Float set(float value) {
        return each([=](int) { return value; });
    }
    static Float load(const float* from) {
        return each([=](int i) { return from[i]; });
    }
    static void store(float* to, Float value) { __builtin_memcpy(to, value.of, sizeof(value.of)); }
    static Float add(Float a, Float b) {
        return each([&](int i) { return a.of[i] + b.of[i]; });
    }
    static Float multiply(Float a, Float b) {
        return each([&](int i) { return a.of[i] * b.of[i]; });
    }
    static Float fma(Float a, Float b, Float c) {
#ifdef __FP_FAST_FMAF
        return each([&](int i) { return __builtin_fmaf(a.of[i], b.of[i], c.of[i]); });
#else
        return each([&](int i) { return a.of[i] * b.of[i] + c.of[i]; });
#endif
    }
    static Float to_float(Int value) {
        return each([&](int i) { return static_cast<float>(value.of[i]); });
    }
    static void prefetch(const void* from) { __builtin_prefetch(from); }

    static float half(uint16_t bits) {
        // The exponent moves from bias 15 to 127 by a product with 2^112, subnormals included.
        const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
        const uint32_t infinite = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
        uint32_t word;
        float value;
        __builtin_memcpy(&value, &magnitude, 4);
        value *= 0x1p112f;
        __builtin_memcpy(&word, &value, 4);
        word |= infinite | static_cast<uint32_t>(bits & 0x8000) << 16;
        __builtin_memcpy(&value, &word, 4);
        return value;
    }
    static Float load_half(const uint8_t* from) {
        uint16_t bits[lanes];
        __builtin_memcpy(bits, from, sizeof(bits));
        return each([&](int i) { return half(bits[i]); });
    }
    static Float load_u8(const uint8_t* from) {
        return each([=](int i) { return static_cast<float>(from[i]); });
    }
    static Float load_i8(const uint8_t* from) {
        return each([=](int i) { return static_cast<float>(static_cast<int8_t>(from[i])); });
    }
    static void load_bf16_pairs(const uint8_t* from, Float& even, Float& odd) {
        uint32_t pairs[lanes];
        __builtin_memcpy(pairs, from, sizeof(pairs));
        for (int i = 0; i < lanes; ++i) {
            const uint32_t low = pairs[i] << 16, high = pairs[i] & 0xffff0000u;
            __builtin_memcpy(&even.of[i], &low, 4);
            __builtin_memcpy(&odd.of[i], &high, 4);
        }
    }

    static Bytes load_bytes(const uint8_t* from) {
        Bytes result;
        __builtin_memcpy(result.of, from, sizeof(result.of));
        return result;
    }
    static Bytes low_nibbles(Bytes bytes) {
        return each_byte([&](int i) { return bytes.of[i] & 15; });
    }
    static Bytes high_nibbles(Bytes bytes) {
        return each_byte([&](int i) { return bytes.of[i] >> 4; });
    }
    template <int shift, int mask>
    static Bytes insert(Bytes quads, Bytes bits) {
        return each_byte([&](int i) {
            const int moved = shift > 0 ? bits.of[i] << (shift & 7) : bits.of[i] >> (-shift & 7);
            return quads.of[i] | (moved & mask);
        });
    }
    static Bytes look_up(Bytes nibbles) {
        return each_byte([&](int i) { return iq4_values[nibbles.of[i]] + 128; });
    }

    template <int zero>
    static Int start(const int32_t* sum_128) {
        Int result;
        for (int i = 0; i < lanes; ++i) result.of[i] = zero == 0 ? 0 : *sum_128 / (128 / (zero == 0 ? 1 : zero));
        return result;
    }
    template <int zero>
    static Int dot(Int sum, Bytes w, const int8_t* x) {
        for (int i = 0; i < lanes; ++i) {
            for (int j = 0; j < 4; ++j) sum.of[i] += w.of[4 * i + j] * x[j];
        }
        return sum;
    }

    static float quantize_block(const float* from, int8_t* to, int32_t* low, int32_t* high) {
        uint32_t largest = 0;  // on the bits, so that NaN counts as the largest and reaches y
        for (int i = 0; i < 32; ++i) {
            uint32_t bits;
            __builtin_memcpy(&bits, from + i, 4);
            bits &= 0x7fffffffu;
            if (bits > largest) largest = bits;
        }
        float maximum;
        __builtin_memcpy(&maximum, &largest, 4);
        *low = *high = 0;
        if (maximum < smallest_maximum) {
            __builtin_memset(to, 0, 32);
            return 0.0f;
        }
        const float inverse = 127.0f / maximum;
        for (int i = 0; i < 32; ++i) {
            // Adding 1.5 * 2^23 rounds to the nearest even integer; its low bits are the integer's.
            const float shifted = from[i] * inverse + 12582912.0f;
            int32_t word;
            __builtin_memcpy(&word, &shifted, 4);
            to[i] = static_cast<int8_t>(word);
            (i < 16 ? *low : *high) += to[i];
        }
        return maximum / 127.0f;
    }
};

}  // namespace
}  // namespace turbolm

#include "matmul_kernel.h"

namespace turbolm {

constinit const MatmulKernels matmul_generic = make_kernels();

}  // namespace turbolm
