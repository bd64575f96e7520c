"""Choose the defense's settings for a model: what ``igd tune`` runs."""
