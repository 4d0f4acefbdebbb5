"""The terminal view, `agentperf top`. It needs the extra ``top``."""
