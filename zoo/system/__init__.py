"""What of the operating system torch and Python have no word for: memory and two calls of Linux."""
