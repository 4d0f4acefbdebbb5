"""Values as bytes, and the registry of storable classes."""
