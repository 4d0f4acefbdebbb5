"""One subscription connection a process, and who listens on it."""
