// Included by each kernels_<isa>.cpp after its Vec: fills a table with the kernels compiled there.
// Everything has internal linkage, so that the linker never mixes instruction sets.
#pragma once

#include "kernels_adapters.h"
#include "kernels_attention.h"
#include "kernels_rows.h"

#define TURBOLM_KERNELS \
    {rms_norm,       add,            rotary_store,    attention, activate_multiply, softcap, \
     adapter_shrink, adapter_expand, attention_bytes, argmax,    exponentials}
