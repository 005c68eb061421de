"""What a model takes on a machine that may not be here: memory, longest contexts, speed; from headers alone.

model     a model's headers: local files, a shape (config.json alone), or a repository read by range requests
headers   those range requests
gpus      the machines that are known by name
speed     seconds of a step
plan      every combination of weights, KV cache and number of GPUs; the answer
"""
