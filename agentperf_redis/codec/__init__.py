"""Encoding of values as bytes, and the registry of storable classes."""
