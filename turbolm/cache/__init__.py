"""Keys and values kept between steps.

    spec          what a model keeps per token, and the memory for it
    block_pool    which KV block belongs to whom
    prefix_cache  which KV block holds which tokens

The last two are plain Python without torch; the scheduler alone changes them.
"""
