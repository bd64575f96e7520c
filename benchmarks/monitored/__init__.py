"""A served model, clients of it, and a Prometheus that watches."""
