"""What the caches of one process share: local copies, buffers of reads, leases, flights."""
