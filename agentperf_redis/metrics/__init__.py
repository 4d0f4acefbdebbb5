"""Metrics of agents: counts, percentiles and errors, shared by all processes of a namespace."""
