"""Graph passes: any traced model to the fused graph. No GPU, no weights data."""
