"""The message bus of a process: its subscriptions and its connections."""
