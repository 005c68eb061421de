// ACTIVATION (0: silu, 1: gelu, 2: gelu_tanh) of a gate.

__device__ __forceinline__ float activate(float gate) {
#if ACTIVATION == 0
    return gate / (1.0f + __expf(-gate));
#elif ACTIVATION == 1
    return 0.5f * gate * (1.0f + erff(gate * 0.70710678118654752f));
#else
    return 0.5f * gate * (1.0f + tanhf(0.79788456080286536f * (gate + 0.044715f * gate * gate * gate)));
#endif
}
