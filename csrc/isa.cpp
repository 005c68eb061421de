#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace turbolm {
namespace {

constexpr const char* kNames[] = {"generic", "neon", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

#if defined(__x86_64__)
bool bit(uint32_t value, int index) { return (value >> index) & 1; }

// Linux hands out the tile registers on request only.
bool request_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Isa detect() {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::generic;
    const bool has_fma = bit(c, 12), has_xsave = bit(c, 27), has_avx = bit(c, 28), has_f16c = bit(c, 29);
    if (!has_xsave || !has_avx) return Isa::generic;
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool os_avx = (low & 0x6) == 0x6, os_avx512 = (low & 0xe6) == 0xe6, os_tiles = (low & 0x60000) == 0x60000;
    uint32_t a7 = 0, b7 = 0, c7 = 0, d7 = 0;
    if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return Isa::generic;
    if (!(os_avx && has_fma && has_f16c && bit(b7, 5))) return Isa::generic;
    const bool has_avx512 = os_avx512 && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F DQ BW VL
    if (!has_avx512) return Isa::avx2;
    if (!bit(c7, 11)) return Isa::avx512;  // VNNI
    uint32_t a71 = 0, b71 = 0, c71 = 0, d71 = 0;
    __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
    if (!bit(a71, 5)) return Isa::avx512vnni;  // BF16
    const bool has_amx = os_tiles && bit(d7, 22) && bit(d7, 24) && bit(d7, 25);  // BF16 TILE INT8
    return has_amx && request_tiles() ? Isa::amx : Isa::avx512bf16;
}
#elif defined(__aarch64__)
Isa detect() { return Isa::neon; }
#else
Isa detect() { return Isa::generic; }
#endif

// The best set, up to `limit`, that this build has code for.
Isa built(Isa limit) {
    Isa best = Isa::generic;
    [[maybe_unused]] const auto consider = [&](Isa candidate) {
        if (candidate <= limit && candidate > best) best = candidate;
    };
#if defined(TURBOLM_BUILD_NEON)
    consider(Isa::neon);
#endif
#if defined(TURBOLM_BUILD_AVX2)
    consider(Isa::avx2);
#endif
#if defined(TURBOLM_BUILD_AVX512)
    consider(Isa::avx512);
#endif
#if defined(TURBOLM_BUILD_AVX512VNNI)
    consider(Isa::avx512vnni);
#endif
#if defined(TURBOLM_BUILD_AVX512BF16)
    consider(Isa::avx512bf16);
#endif
#if defined(TURBOLM_BUILD_AMX)
    consider(Isa::amx);
#endif
    return best;
}

int find(const char* name) {
    for (int i = 0; i < kCount; ++i) {
        if (std::strcmp(kNames[i], name) == 0) return i;
    }
    return -1;
}

Isa best() {
    static const Isa value = built(detect());
    return value;
}

Isa initial() {
    const char* name = std::getenv("TURBOLM_ISA");
    const int wanted = name != nullptr ? find(name) : -1;
    return wanted >= 0 && static_cast<Isa>(wanted) < best() ? built(static_cast<Isa>(wanted)) : best();
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> value{initial()};
    return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

}  // namespace turbolm

extern "C" const char* turbolm_isa_name() { return turbolm::kNames[static_cast<int>(turbolm::isa())]; }

extern "C" int turbolm_isa_select(const char* name) {
    using namespace turbolm;
    const int wanted = *name == '\0' ? static_cast<int>(best()) : find(name);
    if (wanted < 0 || static_cast<Isa>(wanted) > best() || built(static_cast<Isa>(wanted)) != static_cast<Isa>(wanted)) {
        return -1;
    }
    current().store(static_cast<Isa>(wanted));
    return 0;
}
