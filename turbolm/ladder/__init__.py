"""The ladder: which quantization of a model, on the user's data, decided by measurement.

rungs        what is tried: weights × KV cache
climb        runs the rungs, decides, steps back
store        answers and costs, kept as they come, so that a run may be cut off at any point
cost         memory and speed of a rung
report       what was found; table, page and drawing show it
"""
