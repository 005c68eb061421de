#include "isa.h"

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace turbolm {
namespace {

constexpr const char* kNames[] = {"generic", "neon", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

using Sets = uint32_t;  // one bit for each Isa

constexpr Sets bit_of(Isa isa) { return 1u << static_cast<int>(isa); }

#if defined(__x86_64__)
bool bit(uint32_t value, int index) { return (value >> index) & 1; }

// Linux hands out the tile registers on request only, to the whole process.
bool request_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Sets detect() {
    Sets sets = bit_of(Isa::generic);
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return sets;
    const bool has_fma = bit(c, 12), has_xsave = bit(c, 27), has_avx = bit(c, 28), has_f16c = bit(c, 29);
    if (!has_xsave || !has_avx) return sets;
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool os_avx = (low & 0x6) == 0x6, os_avx512 = (low & 0xe6) == 0xe6, os_tiles = (low & 0x60000) == 0x60000;
    uint32_t a7 = 0, b7 = 0, c7 = 0, d7 = 0, a71 = 0, b71 = 0, c71 = 0, d71 = 0;
    if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return sets;
    if (a7 >= 1) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
    if (!(os_avx && has_fma && has_f16c && bit(b7, 5))) return sets;
    sets |= bit_of(Isa::avx2);
    if (bit(a71, 4)) sets |= bit_of(Isa::avxvnni);
    const bool has_avx512 = os_avx512 && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F DQ BW VL
    if (!has_avx512) return sets;
    sets |= bit_of(Isa::avx512);
    if (!bit(c7, 11)) return sets;  // VNNI
    sets |= bit_of(Isa::avx512vnni);
    if (!bit(a71, 5)) return sets;  // BF16
    sets |= bit_of(Isa::avx512bf16);
    const bool has_amx = os_tiles && bit(d7, 22) && bit(d7, 24) && bit(d7, 25);  // BF16 TILE INT8
    return has_amx && request_tiles() ? sets | bit_of(Isa::amx) : sets;
}
#elif defined(__aarch64__)
Sets detect() {
#if defined(__linux__)
    constexpr unsigned long kHalfFloats = 1ul << 10, kDotProducts = 1ul << 20;  // HWCAP_ASIMDHP, HWCAP_ASIMDDP
    const bool has_all = (~getauxval(AT_HWCAP) & (kHalfFloats | kDotProducts)) == 0;
#else
    const bool has_all = true;
#endif
    return has_all ? bit_of(Isa::generic) | bit_of(Isa::neon) : bit_of(Isa::generic);
}
#else
Sets detect() { return bit_of(Isa::generic); }
#endif

// What this build has code for.
constexpr Sets kBuilt = bit_of(Isa::generic)
#if defined(TURBOLM_BUILD_NEON)
                        | bit_of(Isa::neon)
#endif
#if defined(TURBOLM_BUILD_AVX2)
                        | bit_of(Isa::avx2)
#endif
#if defined(TURBOLM_BUILD_AVXVNNI)
                        | bit_of(Isa::avxvnni)
#endif
#if defined(TURBOLM_BUILD_AVX512)
                        | bit_of(Isa::avx512)
#endif
#if defined(TURBOLM_BUILD_AVX512VNNI)
                        | bit_of(Isa::avx512vnni)
#endif
#if defined(TURBOLM_BUILD_AVX512BF16)
                        | bit_of(Isa::avx512bf16)
#endif
#if defined(TURBOLM_BUILD_AMX)
                        | bit_of(Isa::amx)
#endif
    ;

Sets available() {
    static const Sets sets = detect() & kBuilt;
    return sets;
}

// The best set that is available, none above `limit`.
Isa best(Isa limit) {
    const Sets sets = available() & (2 * bit_of(limit) - 1);
    return static_cast<Isa>(std::bit_width(sets) - 1);
}

int find(const char* name) {
    for (int i = 0; i < kCount; ++i) {
        if (std::strcmp(kNames[i], name) == 0) return i;
    }
    return -1;
}

Isa initial() {
    const char* name = std::getenv("TURBOLM_ISA");
    const int wanted = name != nullptr ? find(name) : -1;
    return best(wanted >= 0 ? static_cast<Isa>(wanted) : Isa::amx);
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
    const int wanted = *name == '\0' ? static_cast<int>(best(Isa::amx)) : find(name);
    if (wanted < 0 || (available() & bit_of(static_cast<Isa>(wanted))) == 0) return -1;
    current().store(static_cast<Isa>(wanted));
    return 0;
}
