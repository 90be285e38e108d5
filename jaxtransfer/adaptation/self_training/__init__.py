"""Self-training: the model's own predictions on unlabelled examples are its targets."""

__all__: list[str] = []
