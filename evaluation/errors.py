"""What evaluation refuses."""

from defense import DefenseError


class EvaluationError(DefenseError):
    """A run that cannot be done, or not be continued: another dataset, other settings, an unknown attack."""
