"""A prompt in a model, and the model in a trainer."""
