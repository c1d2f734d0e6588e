"""``ullage run``: start a command, tell its deaths apart, and start it again with a smaller plan."""
