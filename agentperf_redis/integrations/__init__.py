"""Adapters for other frameworks, one module each. Each needs the extra of its name, and nothing else imports it."""
