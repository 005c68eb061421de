// The instructions that a model step is made of, and what computes them.
//
//     t  tokens of the step    s  sequences    r  rows whose logits are wanted    b  blocks per table row
//
// An instruction holds what is the same in every step: addresses, widths, constants. `Step` holds
// what changes: sizes and the batch. turbolm/ops/cpu/instructions.py mirrors these structs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matmul.h"
#include "team.h"

namespace turbolm {

struct Step {
    int64_t num_tokens;     // t
    int64_t num_sequences;  // s
    int64_t num_logits;     // r
    int64_t table_stride;   // b
    const int32_t* token_ids;     // [t]
    const int32_t* positions;     // [t]
    const int32_t* slots;         // [t]
    const int32_t* query_start;   // [s+1]
    const int32_t* context_lens;  // [s]
    const int32_t* block_tables;  // [s, b]
    const int32_t* logit_rows;    // [r]
    float* logits;                // [r, vocabulary]
    const int32_t* adapters;      // [t] place of each row's adapter, -1: none; or null where no row has one
};

enum class Opcode : int32_t {
    embedding, linear, rms_norm, add, rotary_store, attention, activate_multiply, gather, softcap,
    adapter_shrink, adapter_expand, count,
};
enum class CacheType : int32_t { f32, f16, bf16, int8, int4, fp8 };
enum class ActivationKind : int32_t { silu, gelu, gelu_tanh };

// A step of one token is lone. Where its row is short work, every thread does all of it for itself
// rather than wait for another: thread t keeps its copy of such a row in row t of the buffer.
static inline bool is_lone(const Step& step) { return step.num_tokens == 1 && step.num_logits <= 1; }

enum Flags : int32_t {
    kBarrier = 1,      // the threads meet before this instruction, but for lone steps
    kLoneBarrier = 2,  // they meet before it in lone steps
    kOwnInput = 4,     // in lone steps it reads the thread's own copy of its (first) input
    kOwnOutput = 8,    // in lone steps every thread does it, and changes its own copies
    kPostponed = 16,   // in lone steps the next instruction does its work
};

struct Instruction {
    Opcode opcode;
    int32_t flags;
};

// What a thread does of an instruction that works row by row.
struct Rows {
    int64_t first, last;  // these rows; with a lone step's own copies, the one
    int64_t from, to;     // added to the numbers of rows read and written
};

static inline Rows rows_of(const Instruction& head, const Step& step, int64_t count, const Team& team) {
    Rows rows{0, count, 0, 0};
    if (is_lone(step) && head.flags & kOwnInput) rows.from = team.thread;
    if (is_lone(step) && head.flags & kOwnOutput) {
        rows.to = team.thread;
    } else {
        share(team, count, 1, &rows.first, &rows.last);
    }
    return rows;
}

// y[t, k] = rows of the table at token_ids, times scale
struct Embedding {
    Instruction head;
    const Linear* table;
    float* y;
    float scale;
};

// y[rows, n] = x[rows, k] · Wᵀ + bias; rows: t, or r with y in step.logits where y is null
struct LinearOp {
    Instruction head;
    const Linear* linear;
    const float* x;
    float* y;
    uint8_t* workspace;  // matmul_workspace()
};

// residual += x, where there is a residual; y[t, h] = norm(residual or x) * weight
struct RmsNorm {
    Instruction head;
    const float* x;
    float* residual;  // or null
    const float* weight;
    float* y;
    int64_t width;
    float eps;
};

// residual[t, h] += x
struct Add {
    Instruction head;
    const float* x;
    float* residual;
    int64_t width;
};

// One layer's part of the KV pool. v: [block, kv head, token, v_head_dim]. k: [block, kv head,
// token / group, head_dim, token % group], group = min(16, block_size): a vector holds one
// dimension of a group of tokens, so scores need no transposition and no sum across lanes.
// int4: a byte holds two dimensions, the first in its low half: of k, neighbours; of v, dimensions
// i and i + n of each 2 n = 32 (of the rest, where head_dim is no multiple).
// Scales of int8 and int4: [block, kv head, token / group, 2, token % group], scale and minimum.
struct KvPool {
    void* k;
    void* v;
    uint16_t* k_scales;  // float16; or null
    uint16_t* v_scales;
    const uint16_t* k_range;  // float16 scale and minimum of each head, for all tokens; null: each token's own
    const uint16_t* v_range;
    CacheType k_type;
    CacheType v_type;
    int32_t block_size;
};

struct HeadShape {
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t v_head_dim;
};

struct RotaryStore {
    Instruction head;
    float* qkv;  // [t, w]
    const float* cos;  // [positions, rotary_dim / 2], or null
    const float* sin;
    const float* q_norm;  // [head_dim], or null
    const float* k_norm;
    KvPool pool;
    HeadShape shape;
    int32_t rotary_dim;
    int32_t is_interleaved;
    float eps;
};

struct Attention {
    Instruction head;
    const RotaryStore* rotary;  // done by attention itself in lone steps, or null
    const float* qkv;  // [t, w]
    float* y;          // [t, num_heads * v_head_dim]
    uint8_t* workspace;   // attention_bytes()
    int64_t max_context;  // that the workspace was made for
    KvPool pool;
    HeadShape shape;
    int32_t window;  // 0: none
    float scale;
    float softcap;  // 0: none
};

// y[t, f] = activation(gate_up[t, :f]) * gate_up[t, f:]
struct ActivateMultiply {
    Instruction head;
    const float* gate_up;
    float* y;
    int64_t width;  // f
    ActivationKind activation;
};

// y[r, h] = x[logit_rows]
struct Gather {
    Instruction head;
    const float* x;
    float* y;
    int64_t width;
};

// step.logits[r, n] = cap * tanh(· / cap)
struct Softcap {
    Instruction head;
    int64_t width;
    float cap;
};

// Of rows with an adapter: y[t, part * max_rank + i] = x[t, k] · a[place, part * max_rank + i]
struct AdapterShrink {
    Instruction head;
    const float* x;
    const float* a;        // [places, num_parts * max_rank, k]
    const int32_t* ranks;  // [places]: rows of each part that aren't padding; 0: nothing is added
    float* y;
    int64_t width;     // k
    int32_t max_rank;  // a multiple of 16
    int32_t num_parts;
};

// Of those rows: y[t, n] += x[t, part * max_rank + ·] · b[place, ·, n], for the part that column n is in
struct AdapterExpand {
    Instruction head;
    const float* x;
    const float* b;  // [places, max_rank, n]
    const int32_t* ranks;
    float* y;
    int64_t width;  // n
    int32_t max_rank;
    int32_t num_parts;
    int32_t ends[3];  // the column at which each part ends
};

// What each instruction set provides (kernels_<isa>.cpp). All are entered by all threads of the
// team, expect their inputs complete, and are complete after the next barrier.
struct Kernels {
    void (*rms_norm)(const RmsNorm&, const Step&, const Team&);
    void (*add)(const Add&, const Step&, const Team&);
    void (*rotary_store)(const RotaryStore&, const Step&, const Team&);
    void (*attention)(const Attention&, const Step&, const Team&);
    void (*activate_multiply)(const ActivateMultiply&, const Step&, const Team&);
    void (*softcap)(const Softcap&, const Step&, const Team&);
    void (*adapter_shrink)(const AdapterShrink&, const Step&, const Team&);
    void (*adapter_expand)(const AdapterExpand&, const Step&, const Team&);
    // Workspace of `attention` for contexts of up to `max_context` tokens.
    int64_t (*attention_bytes)(const HeadShape& shape, int64_t max_context, int num_threads);
    // Index of the largest of n numbers, the first of equals; -1 where one is NaN or all are -inf.
    int64_t (*argmax)(const float* x, int64_t n);
    // p[i] = exp((x[i] - top) * inverse_temperature); sums[j] = sum of p[1024 j .. 1024 (j + 1))
    void (*exponentials)(const float* x, int64_t n, float top, float inverse_temperature, float* p, double* sums);
};

extern const Kernels kernels_generic;
#if defined(TURBOLM_BUILD_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(TURBOLM_BUILD_AVX512)
extern const Kernels kernels_avx512;
#endif
#if defined(TURBOLM_BUILD_NEON)
extern const Kernels kernels_neon;
#endif

const Kernels& kernels();  // of isa()

}  // namespace turbolm
