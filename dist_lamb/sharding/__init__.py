"""Where the bytes of a sharded model live, and how they move between ranks."""
