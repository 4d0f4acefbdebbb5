"""Shared metrics, caches and load balancing for fleets of AI agents, through one Redis or Valkey."""
