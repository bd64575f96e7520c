"""Evaluation: attacks, protocol, reports and plots."""
