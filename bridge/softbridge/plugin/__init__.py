"""What a plugin brings, how it is found, and what it may say that it can do."""
