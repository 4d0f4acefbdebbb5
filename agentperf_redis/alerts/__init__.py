"""Alerts. Any number of processes evaluate rules on agents, caches and pools, and send notifications."""
