"""What strangers wrote, kept within limits: their JSON, patterns, names and links, other libraries' calls on them, and what of them a
terminal is shown."""
