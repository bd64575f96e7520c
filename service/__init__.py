"""The FastAPI application: bytes -> images -> batching -> predictor -> defense -> schemas."""
