"""Prompts in files: reading, writing, what stands beside them, and what they are."""
