"""Locks and semaphores, shared by all processes: fair, with fencing tokens, and free again when their holder dies."""
