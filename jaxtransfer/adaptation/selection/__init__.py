"""Model selection without target labels: scores of a trained model by what it says of unlabelled data."""

__all__: list[str] = []
