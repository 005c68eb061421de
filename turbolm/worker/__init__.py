"""The engine in a process of its own, watched over by the process that it serves.

`supervisor.SupervisedEngine` stands in for `Engine`; `process` is the other side, `wire` what they say to each other.
"""
