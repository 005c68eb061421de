"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer.

    rows        what works on one token at a time: embedding, norms, rotation, activation
    sampling    a token per row of logits
    decode, prefill, attention      paged attention

Kernels run on the current stream, wait for nothing on the host, and have grids that depend on shapes
alone: a step of them can be captured in a CUDA graph.
"""
