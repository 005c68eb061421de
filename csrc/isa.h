// Which instruction set the kernels may use on this machine.
//
// Files named *_avx2.cpp, *_avx512.cpp, … are compiled with those instructions (setup.py) and must
// be entered only when `isa()` allows them. TURBOLM_BUILD_AVX2, … tell which of them were compiled.
// Keep everything with external linkage in such files out of shared inline functions and standard
// templates: the linker may pick their copy for every caller.
#pragma once

namespace turbolm {

// Each includes the ones before it, but that none includes neon, and of the later ones none avxvnni.
enum class Isa : int {
    generic = 0, neon = 1, avx2 = 2, avxvnni = 3, avx512 = 4, avx512vnni = 5, avx512bf16 = 6, amx = 7,
};

// The best that the processor, the operating system and this build have, or the lesser one that
// the environment variable TURBOLM_ISA names. Cheap.
Isa isa();

}  // namespace turbolm

extern "C" {
__attribute__((visibility("default"))) const char* turbolm_isa_name();  // of isa()
// Use a lesser set, for tests; "" is the best. Returns 0, or -1 where that set is not available.
__attribute__((visibility("default"))) int turbolm_isa_select(const char* name);
}
