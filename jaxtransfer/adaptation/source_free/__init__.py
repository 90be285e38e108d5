"""Source-free and test-time adaptation: a trained model and unlabelled target data, no source at hand."""

__all__: list[str] = []
