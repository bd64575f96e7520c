"""Every Redis key of the store."""


class Keys:
    """The keys of one model.

    The braces are a hash tag: a cluster keeps all keys of a model on one node, so that one script
    may touch them all.

    Raises:
        ValueError: a model name that would break the hash tag.
    """

    def __init__(self, model: str) -> None:
        if not model or "{" in model or "}" in model:
            raise ValueError(f"expected a model name without braces, got {model!r}; rename the model")
        prefix = f"igd:{{{model}}}:"
        self.active = prefix + "active"  # string: the active version
        self.history = prefix + "history"  # sorted set: published versions, in order of publishing
        self.events = prefix + "events"  # stream: version and action of each change
        self.version_prefix = prefix + "version:"
        self._staged_prefix = prefix + "staged:"

    def version(self, version: str) -> str:
        """Hash of a published version: ``blob``, ``sha256`` and ``meta``."""
        return self.version_prefix + version

    def staged(self, version: str) -> str:
        """The same hash while it is not published yet; expires by itself."""
        return self._staged_prefix + version
