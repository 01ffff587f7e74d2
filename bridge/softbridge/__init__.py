"""softbridge."""
