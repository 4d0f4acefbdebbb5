"""The message bus of a process: subscriptions, and their connections."""
