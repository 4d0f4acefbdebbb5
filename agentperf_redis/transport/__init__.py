"""Connections to the server: addresses, handshake, delivery, and the two drivers of flows."""
