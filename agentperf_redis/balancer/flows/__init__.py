"""What a balancer does, as flows: descriptions of I/O that the blocking and the asyncio client both drive."""
