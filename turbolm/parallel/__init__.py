"""Several processes that compute one model together: one per GPU, each with its part of the weights.

shard.py        which part is whose
processes.py    starting the other ranks' processes, watching them, ending them
channel.py      messages to them
collectives.py  sums and gathers over all ranks
peers.py        memory that all GPUs can read and write
"""
