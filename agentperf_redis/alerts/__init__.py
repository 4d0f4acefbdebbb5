"""Alerts: rules on agents, caches and pools, evaluated by any number of processes, and the notifications they send."""
