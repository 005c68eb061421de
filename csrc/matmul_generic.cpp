// Portable kernels, in plain C++ that compilers turn into whatever vectors the target always has.

#include "matmul.h"

namespace turbolm {
namespace {

// The vector types of GCC and Clang: arithmetic on 16 bytes, on any target.
struct Vector {
    static constexpr int lanes = 4;
    static constexpr int row_steps[] = {1};  // unpacking costs little beside these dot products
    typedef float Float __attribute__((vector_size(16)));
    typedef int32_t Int __attribute__((vector_size(16)));
    typedef uint32_t Words __attribute__((vector_size(16)));
    typedef uint8_t Bytes __attribute__((vector_size(16)));

    static Float zero() { return Float{}; }
    static Float set(float value) { return Float{} + value; }
    static Float set(int32_t value) { return Float{} + static_cast<float>(value); }
    static Float load(const float* from) {
        Float result;
        __builtin_memcpy(&result, from, sizeof(result));
        return result;
    }
    static Float load_some(const float* from, int64_t count) {
        Float result{};
        for (int i = 0; i < lanes && i < count; ++i) result[i] = from[i];
        return result;
    }
    static void store_some(float* to, Float value, int64_t count) {
        for (int i = 0; i < lanes && i < count; ++i) to[i] = value[i];
    }
    static Float add(Float a, Float b) { return a + b; }
    static Int add(Int a, Int b) { return a + b; }
    static Float multiply(Float a, Float b) { return a * b; }
    static Float fma(Float a, Float b, Float c) {
#ifdef __FP_FAST_FMAF
        for (int i = 0; i < lanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
        return c;
#else
        return a * b + c;
#endif
    }
    static Float to_float(Int value) { return __builtin_convertvector(value, Float); }
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
        return Float{half(bits[0]), half(bits[1]), half(bits[2]), half(bits[3])};
    }
    static Float load_u8(const uint8_t* from) {
        return __builtin_convertvector((Int{from[0], from[1], from[2], from[3]}), Float);
    }
    static void load_u4_pairs(const uint8_t* from, Float& low, Float& high) {
        const Int both{from[0], from[1], from[2], from[3]};
        low = __builtin_convertvector(both & 15, Float);
        high = __builtin_convertvector(both >> 4, Float);
    }
    static Float load_i8(const uint8_t* from) {
        return load_u8(from) - __builtin_convertvector((Int{from[0], from[1], from[2], from[3]} & 128) * 2, Float);
    }
    static void load_bf16_pairs(const uint8_t* from, Float& even, Float& odd) {
        const Words pairs = reinterpret_cast<Words>(load_bytes(from));
        even = reinterpret_cast<Float>(pairs << 16);
        odd = reinterpret_cast<Float>(pairs & 0xffff0000u);
    }

    static Bytes zero_bytes() { return Bytes{}; }
    static Bytes load_bytes(const uint8_t* from) {
        Bytes result;
        __builtin_memcpy(&result, from, sizeof(result));
        return result;
    }
    static Bytes low_nibbles(Bytes bytes) { return bytes & 15; }
    static Bytes high_nibbles(Bytes bytes) { return bytes >> 4; }
    template <int shift, int mask>
    static Bytes insert(Bytes quads, Bytes bits) {
        Words words = reinterpret_cast<Words>(bits);
        if constexpr (shift > 0) words <<= shift;
        if constexpr (shift < 0) words >>= -shift;
        return quads | (reinterpret_cast<Bytes>(words) & static_cast<uint8_t>(mask));
    }
    static Bytes look_up(Bytes nibbles) {
        for (int i = 0; i < 4 * lanes; ++i) nibbles[i] = static_cast<uint8_t>(iq4_values[nibbles[i]] + 128);
        return nibbles;
    }

    template <int zero>
    static Int start(const int32_t* sum_128) {
        if constexpr (zero == 0) return Int{};
        return Int{} + (*sum_128 / 128 * zero);
    }
    static Int dot(Int sum, Bytes w, const int8_t* x) {
        const Int words = reinterpret_cast<Int>(w);
        sum += (words & 255) * x[0];
        sum += (words >> 8 & 255) * x[1];
        sum += (words >> 16 & 255) * x[2];
        return sum + (words >> 24 & 255) * x[3];
    }

    template <int largest, int rows>
    static void add_products(Int (&low)[rows], Int (&high)[rows], const Bytes* w, const int8_t* x) {
        for (int row = 0; row < rows; ++row) {
            for (int j = 0; j < 4; ++j) {
                low[row] = dot(low[row], w[j], x + 32 * row + 4 * j);
                high[row] = dot(high[row], w[j + 4], x + 32 * row + 4 * j + 16);
            }
        }
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
        return maximum * inverse_127;
    }
};

}  // namespace
}  // namespace turbolm

#include "matmul_table.h"

namespace turbolm {

constinit const MatmulKernels matmul_generic = make_kernels();

}  // namespace turbolm
