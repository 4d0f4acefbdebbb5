"""Metrics of agents: counts, percentiles, errors, shared by all processes of a namespace."""
