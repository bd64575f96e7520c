"""Every Redis key of the ranking jobs; RQ's own are ``rq:*``."""

from importance_store.keys import Keys

_QUEUE_PREFIX = "igd-"


class JobKeys(Keys):
    """The keys of one model's jobs, beside those of its importance."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        prefix = f"igd:{{{model}}}:"
        self.queue = _QUEUE_PREFIX + model  # name of the RQ queue
        self.jobs = prefix + "jobs"  # sorted set: job ids by time of submission
        self.submitting = prefix + "submitting"  # lock: one submission at a time
        self._job_prefix = prefix + "job:"
        self._in_flight_prefix = prefix + "in-flight:"
        self._idempotency_prefix = prefix + "idempotency:"

    @staticmethod
    def model_of(queue: str) -> str:
        """The model whose jobs wait in an RQ queue."""
        return queue.removeprefix(_QUEUE_PREFIX)

    def progress(self, job_id: str) -> str:
        """String: JSON of the job's progress and the tail of its log, expires with the job."""
        return self._job_prefix + job_id

    def alive(self, job_id: str) -> str:
        """String: host and id of the process that runs the job; gone seconds after nobody renews it any more."""
        return f"{self._job_prefix}{job_id}:alive"

    def cancelled(self, job_id: str) -> str:
        """String: when the job's cancelling was asked for, ISO 8601; the process that runs it then ends."""
        return f"{self._job_prefix}{job_id}:cancelled"

    def in_flight(self, fingerprint: str) -> str:
        """String: id of the latest job with this request."""
        return self._in_flight_prefix + fingerprint

    def idempotency(self, key: str) -> str:
        """String: JSON of the request's fingerprint and job id that came with this Idempotency-Key."""
        return self._idempotency_prefix + key
