// Instructions, one after the other, by a team of threads; and the C functions that Python calls.
#include <cstring>

#include "isa.h"
#include "ops.h"
#include "threads.h"

#define TURBOLM_EXPORT extern "C" __attribute__((visibility("default")))

namespace turbolm {

const Kernels& kernels() {
    [[maybe_unused]] const Isa best = isa();
#if defined(TURBOLM_BUILD_AVX512)
    if (best >= Isa::avx512) return kernels_avx512;
#endif
#if defined(TURBOLM_BUILD_AVX2)
    if (best >= Isa::avx2) return kernels_avx2;
#endif
#if defined(TURBOLM_BUILD_NEON)
    if (best == Isa::neon) return kernels_neon;
#endif
    return kernels_generic;
}

namespace {

template <class Op>
const Op& as(const Instruction& instruction) {
    return reinterpret_cast<const Op&>(instruction);  // every instruction begins with its head
}

void multiply(const LinearOp& op, const Step& step, const Team& team) {
    MatmulArgs args;
    const bool has_own_input = is_lone(step) && (op.head.flags & kOwnInput) != 0;
    args.linear = op.linear;
    args.x = op.x + (has_own_input ? team.thread * op.linear->k : 0);
    args.ldx = op.linear->k;
    args.rows = op.y != nullptr ? step.num_tokens : step.num_logits;
    args.y = op.y != nullptr ? op.y : step.logits;
    args.ldy = op.linear->n;
    args.workspace = op.workspace;
    matmul(args, team);
}

void look_up(const Embedding& op, const Step& step, const Team& team) {
    const bool is_own = is_lone(step) && (op.head.flags & kOwnOutput) != 0;
    const int64_t width = op.table->k;
    embedding(op.table->parts[0], width, step.token_ids, step.num_tokens, op.scale,
              op.y + (is_own ? team.thread * width : 0), width, is_own ? Team{0, 1, nullptr} : team);
}

void gather(const Gather& op, const Step& step, const Team& team) {
    const Rows rows = rows_of(op.head, step, step.num_logits, team);
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const float* x = op.x + (step.logit_rows[row] + rows.from) * op.width;
        std::memcpy(op.y + (row + rows.to) * op.width, x, op.width * sizeof(float));
    }
}

void execute(const Instruction& instruction, const Step& step, const Team& team) {
    const Kernels& native = kernels();
    switch (instruction.opcode) {
        case Opcode::embedding: look_up(as<Embedding>(instruction), step, team); break;
        case Opcode::linear: multiply(as<LinearOp>(instruction), step, team); break;
        case Opcode::rms_norm: native.rms_norm(as<RmsNorm>(instruction), step, team); break;
        case Opcode::add: native.add(as<Add>(instruction), step, team); break;
        case Opcode::rotary_store: native.rotary_store(as<RotaryStore>(instruction), step, team); break;
        case Opcode::attention: native.attention(as<Attention>(instruction), step, team); break;
        case Opcode::activate_multiply: native.activate_multiply(as<ActivateMultiply>(instruction), step, team); break;
        case Opcode::gather: gather(as<Gather>(instruction), step, team); break;
        case Opcode::softcap: native.softcap(as<Softcap>(instruction), step, team); break;
        case Opcode::adapter_shrink: native.adapter_shrink(as<AdapterShrink>(instruction), step, team); break;
        case Opcode::adapter_expand: native.adapter_expand(as<AdapterExpand>(instruction), step, team); break;
        case Opcode::count: break;
    }
}

struct Call {
    const Instruction* const* instructions;
    int64_t count;
    const Step* step;
};

constexpr int64_t kAheadBytes = 64 << 10;  // stay in the second-level cache until they are used
constexpr int64_t kAheadInstructions = 3;

// The first weights that this thread will read at or soon after instruction i: `matmul` gives threads
// equal shares of a layer's bytes.
Ahead weights_ahead(const Call& call, int64_t i, const Team& team) {
    const int64_t end = i + kAheadInstructions < call.count ? i + kAheadInstructions : call.count;
    while (i < end && call.instructions[i]->opcode != Opcode::linear) ++i;
    if (i == end) return {};
    const Linear& linear = *as<LinearOp>(*call.instructions[i]).linear;
    const auto bytes_of = [&](const LinearPart& part) {
        return num_groups(part.n) * group_bytes(part.format, linear.k);
    };
    int64_t total = 0;
    for (int number = 0; number < linear.num_parts; ++number) total += bytes_of(linear.parts[number]);
    int64_t first = total * team.thread / team.num_threads;
    const int64_t size = total / team.num_threads < kAheadBytes ? total / team.num_threads : kAheadBytes;
    for (int number = 0; number < linear.num_parts; ++number) {
        const LinearPart& part = linear.parts[number];
        const int64_t left = bytes_of(part) - first;
        if (left > 0) return {part.packed + first, part.packed + first + (size < left ? size : left)};
        first = -left;
    }
    return {};
}

void execute_all(void* argument, const Team& team) {
    const Call& call = *static_cast<const Call*>(argument);
    const bool lone = is_lone(*call.step);
    for (int64_t i = 0; i < call.count; ++i) {
        const Instruction& instruction = *call.instructions[i];
        if (lone && (instruction.flags & kPostponed) != 0) continue;
        if ((instruction.flags & (lone ? kLoneBarrier : kBarrier)) != 0) team.barrier(weights_ahead(call, i, team));
        execute(instruction, *call.step, team);
    }
}

constexpr int64_t kSizes[] = {
    sizeof(Embedding), sizeof(LinearOp),         sizeof(RmsNorm), sizeof(Add),     sizeof(RotaryStore),
    sizeof(Attention), sizeof(ActivateMultiply), sizeof(Gather),  sizeof(Softcap), sizeof(AdapterShrink),
    sizeof(AdapterExpand), sizeof(Step),
};
static_assert(sizeof(kSizes) / sizeof(kSizes[0]) == static_cast<size_t>(Opcode::count) + 1);

}  // namespace
}  // namespace turbolm

using namespace turbolm;

TURBOLM_EXPORT ThreadTeam* turbolm_team_new(int32_t num_threads) { return new ThreadTeam(num_threads); }
TURBOLM_EXPORT void turbolm_team_free(ThreadTeam* team) { delete team; }

// Runs the instructions in order with this step's sizes and batch.
TURBOLM_EXPORT void turbolm_run(ThreadTeam* team, const Instruction* const* instructions, int64_t count,
                                const Step* step) {
    Call call{instructions, count, step};
    team->run(execute_all, &call);
}

TURBOLM_EXPORT int64_t turbolm_attention_workspace(const HeadShape* shape, int64_t max_context, int32_t num_threads) {
    return kernels().attention_bytes(*shape, max_context, num_threads);
}

// Size of the struct of an opcode, or of Step: Python checks that its mirrors agree.
TURBOLM_EXPORT int64_t turbolm_struct_size(int32_t opcode) { return kSizes[opcode]; }
