"""/importance: the versions in the store; look at one, publish or roll back to one."""

import asyncio
import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from defense import DefenseError, NeuronImportance
from importance_store import LoadedImportance, StoredVersion, StoreError, StoreUnavailable
from service.errors import Unprocessable
from service.routes.auth import require_admin
from service.routes.documentation import problems
from service.runtime import Runtime, runtime_of
from service.schemas import ImportanceListResponse, ImportanceResponse, VersionResponse

router = APIRouter(tags=["importance"])
BYTES = "application/octet-stream"


@router.get("/importance", response_model=ImportanceListResponse)
async def list_importance(request: Request) -> ImportanceListResponse:
    """The versions in the store, newest first. Answers while the store is away, too, and says so."""
    runtime = runtime_of(request)
    versions: list[StoredVersion] = []
    problem, up = runtime.problem, runtime.store_up
    if up:
        try:
            versions = await asyncio.to_thread(runtime.store.versions)
        except StoreUnavailable as error:
            up, problem = False, str(error)
        except StoreError as error:  # one damaged version, say
            problem = str(error)
    else:
        problem = problem or "the store is away; this replica goes on with the importance it has in memory"
    return ImportanceListResponse(
        model=runtime.predictor.config.name,
        serving=runtime.served.version if runtime.served else None,
        active=runtime.active_version,
        store_up=up,
        problem=problem,
        versions=[version_response(version) for version in versions],
    )


@router.get(
    "/importance/{version}",
    response_model=ImportanceResponse,
    responses=problems(404, 422, 503) | {200: {"content": {BYTES: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def show_importance(
    request: Request,
    version: str,
    top_k: Annotated[
        int | None, Query(ge=1, le=1000, description="Neurons of each class; the served top_k by default.")
    ] = None,
) -> Response:
    """One version as the importance dictionary; with `Accept: application/octet-stream` its safetensors bytes."""
    runtime = runtime_of(request)
    loaded = await asyncio.to_thread(runtime.store.load, version)
    if BYTES in request.headers.get("accept", ""):
        headers = {"Content-Disposition": f'attachment; filename="{version}.safetensors"'}
        return Response(loaded.importance.to_bytes(), media_type=BYTES, headers=headers)
    # In a thread: a thousand classes are megabytes of JSON, and the event loop has predictions to answer.
    return await asyncio.to_thread(_dictionary_response, runtime, loaded, top_k)


def _dictionary_response(runtime: Runtime, loaded: LoadedImportance, top_k: int | None) -> JSONResponse:
    config, (version, importance) = runtime.predictor.config, loaded
    body = {
        "version": version,
        "active": version == runtime.active_version,
        "metadata": importance.metadata(),
        "classes": importance_dictionary(importance, config.labels, top_k or config.defense.top_k),
    }
    return JSONResponse(body)


@router.post(
    "/importance/{version}/activate",
    response_model=VersionResponse,
    responses=problems(401, 403, 404, 409, 422, 503),
    dependencies=[Depends(require_admin)],
)
async def activate_importance(request: Request, version: str) -> VersionResponse:
    """Serve a version on every replica, within a second; also the way to roll back. Needs the admin key."""
    return await asyncio.to_thread(_activate, runtime_of(request), version)


def _activate(runtime: Runtime, version: str) -> VersionResponse:
    store = runtime.store
    loaded = store.load(version, model_digest=runtime.predictor.model_digest)
    try:
        runtime.check_importance(loaded.importance)
    except DefenseError as error:
        raise Unprocessable(f"version {version} cannot be served: {error}") from error
    store.activate(version)
    blob = loaded.importance.to_bytes()
    sha256 = hashlib.sha256(blob).hexdigest()
    return version_response(StoredVersion(version, True, loaded.importance.metadata(), len(blob), sha256))


def version_response(stored: StoredVersion) -> VersionResponse:
    """A stored version as the API shows it."""
    return VersionResponse.model_validate(
        stored.metadata
        | {
            "version": stored.version,
            "active": stored.active,
            "size_bytes": stored.size_bytes,
            "sha256": stored.sha256,
        }
    )


def importance_dictionary(
    importance: NeuronImportance, labels: tuple[str, ...], top_k: int
) -> dict[str, list[dict[str, Any]]]:
    """For each class label its ``top_k`` most important neurons, best first."""
    top_k = min(top_k, importance.num_neurons)
    if len(labels) != importance.num_classes:  # it was made for another model
        labels = tuple(map(str, range(importance.num_classes)))
    names = importance.class_names or labels
    scores, neurons = importance.scores.sort(dim=1, descending=True, stable=True)
    return {
        name: [{"neuron": n, "score": s} for n, s in zip(row_n, row_s, strict=True)]
        for name, row_n, row_s in zip(names, neurons[:, :top_k].tolist(), scores[:, :top_k].tolist(), strict=True)
    }
