"""/rank-neurons: the admin job that computes and publishes an importance."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from importance_store import StoreUnavailable
from service.jobs import UNFINISHED
from service.routes.auth import require_admin
from service.routes.documentation import problems
from service.runtime import runtime_of
from service.schemas import RankingJob, RankingJobList, RankRequest

router = APIRouter(prefix="/rank-neurons", tags=["ranking"], dependencies=[Depends(require_admin)])
EVENT_S = 0.5


@router.post("", status_code=202, response_model=RankingJob, responses=problems(401, 403, 422, 503))
async def rank_neurons(
    request: Request,
    body: RankRequest,
    idempotency_key: Annotated[str | None, Header(max_length=200, description="Repeat it to get the same job.")] = None,
) -> JSONResponse:
    """Submit a ranking job; `Location` is where to follow it. A request equal to one in flight gets that job."""
    runtime = runtime_of(request)
    runtime.check_rank_request(body)
    job, _ = await asyncio.to_thread(
        runtime.jobs.submit,
        body,
        model_digest=runtime.predictor.model_digest,
        expected_active=await asyncio.to_thread(runtime.store.active_version),
        idempotency_key=idempotency_key,
        asked_by=request.state.known,
    )
    return JSONResponse(job.model_dump(mode="json"), 202, {"Location": f"/rank-neurons/{job.id}"})


@router.get("", response_model=RankingJobList, responses=problems(401, 403, 503))
async def list_jobs(request: Request) -> RankingJobList:
    """The ranking jobs, newest first; those that ended are kept for a week."""
    return RankingJobList(jobs=await asyncio.to_thread(runtime_of(request).jobs.all))


@router.get("/{job_id}", response_model=RankingJob, responses=problems(401, 403, 404, 422, 503))
async def show_job(request: Request, job_id: str) -> RankingJob:
    """One job: its state, progress, and what came of it."""
    return await asyncio.to_thread(runtime_of(request).jobs.get, job_id)


@router.delete("/{job_id}", response_model=RankingJob, responses=problems(401, 403, 404, 409, 422, 503))
async def cancel_job(request: Request, job_id: str) -> RankingJob:
    """Cancel a queued or running job."""
    return await asyncio.to_thread(runtime_of(request).jobs.cancel, job_id)


@router.get("/{job_id}/events", responses=problems(401, 403, 404, 422, 503))
async def follow_job(request: Request, job_id: str) -> StreamingResponse:
    """Server-sent events: the job as JSON whenever it changes, until it has ended."""
    first = await asyncio.to_thread(runtime_of(request).jobs.get, job_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(request, first), media_type="text/event-stream", headers=headers)


async def _events(request: Request, job: RankingJob) -> AsyncIterator[str]:
    yield _event(job)
    while job.state in UNFINISHED and not runtime_of(request).draining:
        await asyncio.sleep(EVENT_S)
        try:
            latest = await asyncio.to_thread(runtime_of(request).jobs.get, job.id)
        except StoreUnavailable as error:
            yield f": {error}\n\n"  # a comment: the connection stays, the job goes on
            continue
        if latest != job:
            job = latest
            yield _event(job)


def _event(job: RankingJob) -> str:
    return f"event: job\ndata: {job.model_dump_json()}\n\n"
