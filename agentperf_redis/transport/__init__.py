"""Connections to the server: addresses, the handshake, delivery of commands, and the two drivers of flows."""
