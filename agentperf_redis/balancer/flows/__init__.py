"""The balancer's operations as flows: descriptions of I/O that the blocking and the asyncio client both run."""
