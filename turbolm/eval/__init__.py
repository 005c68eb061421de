"""How good a model's answers are: data, checks, probes, agreement of two runs, and the statistics of pairs."""
