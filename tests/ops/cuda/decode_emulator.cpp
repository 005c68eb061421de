// Runs kernels/decode.cu on the CPU: see emulator.h.

#define CTA_THREADS (32 * WARPS)

#include "emulator.h"

static u32 given_words[CTA_THREADS / WARP][2][WARP];  // of shuffles, in turn
static const char *pool_begin[4], *pool_end[4];       // K and V, and their scales

template <typename T>
static T exchange(T value, int from) {
    static_assert(sizeof(T) <= 4, "");
    auto& given = given_words[current / WARP];
    int turn = threads[current].warp_barriers & 1;
    std::memcpy(&given[turn][current % WARP], &value, sizeof(T));
    __syncwarp();
    T found;
    std::memcpy(&found, &given[turn][from], sizeof(T));
    return found;
}

template <typename T>
static T from_lane(T value, int lane) { return exchange(value, lane); }
template <typename T>
static T from_lane_xor(T value, int mask) { return exchange(value, current % WARP ^ mask); }
static bool is_any(bool value) {
    int turn = threads[current].warp_barriers & 1;
    exchange((int)value, 0);
    for (u32 given : given_words[current / WARP][turn])
        if (given) return true;
    return false;
}
static int first_lane_where(bool value) {
    int turn = threads[current].warp_barriers & 1, lane = 0;
    exchange((int)value, 0);
    while (lane < WARP && !given_words[current / WARP][turn][lane]) lane++;
    return lane;
}
static int sum_up_to_lane(int value, int lane) {
    int turn = threads[current].warp_barriers & 1, sum = 0;
    exchange(value, 0);
    for (int i = 0; i <= lane; i++) sum += (int)given_words[current / WARP][turn][i];
    return sum;
}

static u32 pack_elements(float low, float high) { return to_element(low) | (u32)to_element(high) << 16; }
static u32 low_halves(u32 a, u32 b) { return (a & 0xffff) | b << 16; }
static u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000); }
static u32 pack_halves(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
static float low_half(u32 pair) { return half_to_float(pair & 0xffff); }
static float high_half(u32 pair) { return half_to_float(pair >> 16); }
static float sum_of_halves(u32 pair) { return low_half(pair) + high_half(pair); }
static u32 even_bytes(u32 bytes) { return bytes & 0x00ff00ff; }
static u32 odd_bytes(u32 bytes) { return bytes >> 8 & 0x00ff00ff; }
static float fp8_to_float(u32 bits) {  // e4m3, finite
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float value = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return bits & 0x80 ? -value : value;
}
static u32 numbers_of_fp8(u32 bytes) {
    return pack_halves(fp8_to_float(bytes & 0xff), fp8_to_float(bytes >> 8 & 0xff));
}
static u32 transpose(u32 pair) {
    const int turn = threads[current].warp_barriers & 1, g = current % WARP / 4, c = current % WARP % 4;
    exchange(pair, 0);
    const u32(&given)[WARP] = given_words[current / WARP][turn];
    const u32 low = given[2 * c * 4 + g / 2], high = given[(2 * c + 1) * 4 + g / 2];
    return g % 2 ? high_halves(low, high) : low_halves(low, high);
}
static void multiply_add_halves(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_add_as(half_to_float, sum, a0, a1, a2, a3, b0, b1);
}
static float power_of_two(float x) { return std::exp2(x); }

static uint4 read_global(const void* from) {
    check(threads[current].has_waited, "q is read too early");
    return *(const uint4*)from;
}
static float4 read_fresh(const float* from) { return *(const float4*)from; }
static float read_fresh_float(const float* from) { return *from; }
static int count_up(int* counter, int lane) {
    int before = lane == 0 ? (*counter)++ : 0;
    return from_lane(before, 0);
}

template <int TO, int FROM>
static void copy_async_or_zero(u32 to, const void* base, bool present) {
    const char* from = (const char*)base + FROM;
    if (present) {
        bool inside = false;
        for (int i = 0; i < 4; i++) inside |= from >= pool_begin[i] && from + 16 <= pool_end[i];
        check(inside, "read past K and V");
    }
    start_copy(to + TO, present ? from : nullptr);
}

#include "decode.cu"

// order: 1: threads, and CTAs, run from first to last, -1: the other way round.
extern "C" void emulate(const Arguments* given, int ctas, long num_shared, long pool_bytes, long scale_bytes,
                        int order) {
    kernel = [given] { decode(*given); };
    shared_bytes = num_shared;
    const void* pools[4] = {given->k, given->v, given->k_scales, given->v_scales};
    for (int i = 0; i < 4; i++) {
        pool_begin[i] = (const char*)pools[i];
        pool_end[i] = pool_begin[i] + (i < 2 ? pool_bytes : scale_bytes);
    }
    gridDim = {(unsigned)ctas, 1};
    for (int cta = 0; cta < ctas; cta++) run_cta({(unsigned)(order > 0 ? cta : ctas - 1 - cta), 0}, order > 0);
}
