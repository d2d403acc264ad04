"""What tests of engines share."""

from collections.abc import Iterator

import pytest

from flows.cluster.connection import connected
from tests.ray_cluster import RayCluster


@pytest.fixture(scope="module")
def joined(cluster: RayCluster) -> Iterator[RayCluster]:
    """The cluster, to which this process stays connected, as with several trials at the same time."""
    with connected(cluster.address, "engine"):
        yield cluster
