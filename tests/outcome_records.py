"""What ``igd evaluate`` left in a folder, to compare runs by."""

import json
from pathlib import Path


def records(folder: Path) -> dict[str, object]:
    """All outcomes, without the time they took."""
    found = {}
    for path in sorted((folder / "outcomes").rglob("*.json")):
        data = json.loads(path.read_text())
        for record in data["attacks"].values():
            del record["seconds"]
        found[str(path.relative_to(folder))] = data
    return found
