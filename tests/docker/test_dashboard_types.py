"""The dashboards against Grafana's own types: a misspelt key, a wrong type or an unknown word does not compile."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
DASHBOARDS = sorted((REPOSITORY / "docker/grafana/dashboards").glob("*.json"))
PACKAGES = "@grafana/schema@12.1.0 typescript@5.9.3"
OPTIONS = {"timeseries": "TimeSeries", "stat": "Stat", "bargauge": "BarGauge"}

# JSON has an enumeration's words where TypeScript wants its members.
HEAD = """
import type { Dashboard, Panel, RowPanel } from "@grafana/schema";
type Json<T> =
  T extends string ? `${T}`
  : T extends (infer U)[] ? Json<U>[]
  : T extends object ? { [K in keyof T]: Json<T[K]> }
  : T;
interface PrometheusQuery { refId: string; expr: string; legendFormat: string; instant: boolean; range: boolean }
"""
IMPORT = (
    "import type {{ Options as {name}Options }} from"
    ' "@grafana/schema/dist/esm/raw/composable/{kind}/panelcfg/x/{name}PanelCfg_types.gen";'
)

Json = dict[str, Any]


def as_typescript(dashboard: Json) -> str:
    """Constants, each with the type that it must have."""
    imports = [IMPORT.format(name=name, kind=kind) for kind, name in OPTIONS.items()]
    parts = enumerate(typed_parts(dashboard))
    constants = [f"export const part{i}: {kind} = {json.dumps(value)};" for i, (kind, value) in parts]
    return "\n".join([HEAD, *imports, *constants])


def typed_parts(dashboard: Json) -> Iterator[tuple[str, Json]]:
    """What Grafana leaves open in a panel, its options and queries, and the rest."""
    yield "Json<Dashboard>", {key: value for key, value in dashboard.items() if key != "panels"}
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield "Json<RowPanel>", panel
            continue
        yield "Json<Panel>", {key: value for key, value in panel.items() if key not in ("options", "targets")}
        yield f"Partial<Json<{OPTIONS[panel['type']]}Options>>", panel["options"]
        for target in panel["targets"]:
            yield "PrometheusQuery", target


@pytest.fixture(scope="module")
def compiler_says(find_tool: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Json], str]:
    """What the TypeScript compiler has against a dashboard."""
    node = find_tool("node", "install Node.js")
    installed = Path(os.environ.get("GRAFANA_SCHEMA", REPOSITORY / ".cache/npm")).absolute() / "node_modules"
    compiler = installed / "typescript/bin/tsc"
    if not ((installed / "@grafana/schema").is_dir() and compiler.exists()):
        pytest.skip(f"Grafana's types are not installed; npm install --prefix .cache/npm {PACKAGES}")
    directory = tmp_path_factory.mktemp("types")
    (directory / "node_modules").symlink_to(installed)

    def check(dashboard: Json) -> str:
        (directory / "dashboard.ts").write_text(as_typescript(dashboard))
        command = [node, compiler, "--noEmit", "--strict", "--skipLibCheck", "dashboard.ts"]
        return subprocess.run(command, cwd=directory, capture_output=True, text=True).stdout

    return check


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_what_grafana_s_types_say(path: Path, compiler_says: Callable[[Json], str]) -> None:
    assert compiler_says(json.loads(path.read_text())) == ""


@pytest.mark.parametrize(
    ("found", "made"),
    [
        ('"timezone"', '"timezzone"'),
        ('"mode": "multi"', '"mode": "many"'),
        ('"instant": false', '"instant": "no"'),
        ('"showLegend": true', '"showLegends": true'),
    ],
)
def test_a_mistake_is_found(found: str, made: str, compiler_says: Callable[[Json], str]) -> None:
    text = DASHBOARDS[0].read_text()
    assert found in text
    assert "error TS" in compiler_says(json.loads(text.replace(found, made, 1)))
