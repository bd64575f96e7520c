"""Write the dashboards: python docker/grafana/generate.py [DIRECTORY]. Grafana reads the JSON; they are edited here."""

import json
import sys
from pathlib import Path

from defense_board import defense
from jobs_board import jobs
from panels import COLUMNS, DATASOURCE, Json, Rows
from service_board import service

DIRECTORY = Path(__file__).parent / "dashboards"


def dashboards() -> dict[str, str]:
    """File name and text of each."""
    made = [
        dashboard("igd-service", "IG-Defense: Service", service()),
        dashboard("igd-defense", "IG-Defense: Defense", defense()),
        dashboard("igd-jobs", "IG-Defense: Ranking jobs", jobs()),
    ]
    return {f"{d['uid'].removeprefix('igd-')}.json": json.dumps(d, indent=2) + "\n" for d in made}


def dashboard(uid: str, title: str, rows: Rows) -> Json:
    """A dashboard, its panels in rows."""
    panels: list[Json] = []
    y = 0
    for name, contents in rows:
        panels.append({"type": "row", "title": name, "collapsed": False, "panels": [], "gridPos": _place(24, 1, 0, y)})
        y = _lay_out(contents, y + 1)
        panels += contents
    for number, made in enumerate(panels, 1):
        made["id"] = number
    return {
        "uid": uid,
        "title": title,
        "tags": ["ig-defense"],
        "schemaVersion": 41,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "links": [
            {
                "type": "dashboards",
                "title": "IG-Defense",
                "tags": ["ig-defense"],
                "asDropdown": False,
                "icon": "",
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "tooltip": "",
                "url": "",
            }
        ],
        "templating": {"list": [instance_variable()]},
        "panels": panels,
    }


def instance_variable() -> Json:
    """Which replicas to show; all by default."""
    query = 'label_values(igd_in_flight{job="ig-defense"}, instance)'
    return {
        "type": "query",
        "name": "instance",
        "label": "Replica",
        "datasource": DATASOURCE,
        "query": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _lay_out(panels: list[Json], y: int) -> int:
    """Give panels their places from ``y`` on, left to right; returns where the next row begins."""
    x = height = 0
    for made in panels:
        place = made["gridPos"]
        if x + place["w"] > COLUMNS:
            x, y = 0, y + height
        place.update(x=x, y=y)
        x, height = x + place["w"], place["h"]
    return y + height


def _place(width: int, height: int, x: int, y: int) -> Json:
    return {"w": width, "h": height, "x": x, "y": y}


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY
    for name, text in dashboards().items():
        (directory / name).write_text(text)
