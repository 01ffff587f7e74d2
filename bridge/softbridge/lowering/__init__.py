"""From the prompt that was read to one that the target can hold, by passes that each say what they change."""
