"""softbridge plugin."""
