"""How a device is reached: sockets, memory, status and features; nothing of what it does."""
