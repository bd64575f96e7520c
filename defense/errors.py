"""What can go wrong in the defense.

::

    DefenseError
    ├── SplitError             the model cannot be split into trunk and tail at that layer
    ├── ImportanceError        the importance is not usable at all: NaN, wrong shape, unreadable bytes
    │   └── ImportanceMismatch it was made for another model, layer or set of classes
    ├── ProbeSetError          the probe images or their labels do not fit the model
    │   └── UnreadableImage    one image of a probe set cannot be decoded
    ├── ClipError              CLIP cannot be loaded, or was given what it cannot encode
    └── ModelDirectoryError    model.toml, the weights or another file of a model directory is at fault

Every message says what was expected, what was found and what to do.
"""


class DefenseError(Exception):
    """Base of every error this package raises on purpose."""


class SplitError(DefenseError):
    """The model cannot be split into trunk and tail at that layer."""


class ImportanceError(DefenseError):
    """The importance is not usable: not finite, of the wrong shape, or unreadable."""


class ImportanceMismatch(ImportanceError):
    """The importance was made for another model, layer or set of classes."""


class ProbeSetError(DefenseError):
    """The probe images or their labels do not fit the model."""


class ModelDirectoryError(DefenseError):
    """A file of a model directory is missing or wrong."""


class UnreadableImage(ProbeSetError):
    """One image of a probe set cannot be decoded."""


class ClipError(DefenseError):
    """CLIP cannot be loaded, or was given what it cannot encode."""
