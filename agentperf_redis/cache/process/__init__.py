"""The state that the caches of one process share: local copies, access buffers, leases, flights."""
