"""The work pool whose worker runs the deployments: in the worker's own environment, with the engine's own command."""

from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound

POOL = "reprise"
# The queue of the deployments that are limited to one run at a time.
_ONE_AT_A_TIME = "production"
# Unlike Prefect's template, this has no `command`, `env` and `working_dir`: a deployment cannot choose what the worker
# executes instead of a flow. A flow that writes into its worker's pipe would end with the worker.
_TEMPLATE: dict[str, Any] = {
    "job_configuration": {"name": "{{ name }}", "labels": "{{ labels }}", "stream_output": "{{ stream_output }}"},
    "variables": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "title": "Name", "description": "Name of the process."},
            "labels": {
                "type": "object",
                "title": "Labels",
                "description": "Labels of the process.",
                "additionalProperties": {"type": "string"},
            },
            "stream_output": {
                "type": "boolean",
                "title": "Stream output",
                "description": "Whether the worker prints what flows print; run folders have it anyway.",
                "default": False,
            },
        },
        "additionalProperties": False,
    },
}


def make_pool(client: SyncPrefectClient) -> None:
    """Make the pool and its queues, or update a pool that has another template."""
    try:
        if client.read_work_pool(POOL).base_job_template != _TEMPLATE:
            client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=_TEMPLATE))
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=_TEMPLATE))
    try:
        client.read_work_queue_by_name(_ONE_AT_A_TIME, work_pool_name=POOL)
    except ObjectNotFound:
        client.create_work_queue(_ONE_AT_A_TIME, concurrency_limit=1, work_pool_name=POOL)
