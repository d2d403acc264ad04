"""Roles: duplicates wherever they lie, in any group of buckets, and validation text in every source."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_scoring.corpus import digests as digests_module
from data_scoring.corpus.digests import find_duplicates, groups_of_buckets, write_digests
from data_scoring.corpus.roles import Roles, assign_roles, documents_with_roles, hold_out
from data_scoring.corpus.tokenise import DOCUMENT, StagedPart


def ignore(done: int) -> None:
    pass


def stage(folder: Path, name: str, digests: NDArray[np.uint64]) -> StagedPart:
    rows = np.zeros(len(digests), DOCUMENT)
    rows["digest"], rows["num_tokens"], rows["num_bytes"] = digests, 10, 30
    part = StagedPart(name, folder / name, {"documents": len(rows)})
    rows.tofile(part.path("documents"))
    write_digests(part.documents(), part.path("digests"), part.path("digest-bounds.npy"))
    return part


def roles_of(folder: Path, parts: list[StagedPart], fraction: float, seed: int, num_groups: int = 1) -> list[Roles]:
    groups = [range(start, start + 256 // num_groups) for start in range(0, 256, 256 // num_groups)]
    for group in groups:
        find_duplicates(group, ignore, staging=folder, parts=[part.prefix for part in parts])
    options = {"staging": folder, "groups": groups, "validation_fraction": fraction, "seed": seed}
    return [assign_roles(entry, ignore, **options) for entry in enumerate(parts)]


def read_roles(part: StagedPart, roles: Roles) -> NDArray[np.uint8]:
    return np.concatenate([np.empty(0, np.uint8), *(each for _, each in documents_with_roles(part, roles.held_out))])


def test_every_source_of_two_documents_or_more_has_validation_text(tmp_path: Path) -> None:
    counts = {"many": 400, "few": 40, "two": 2, "one": 1}
    generator = np.random.default_rng(1)
    digests = {name: generator.integers(0, 2**64, count, np.uint64) for name, count in counts.items()}
    # The documents of a source may be in several parts.
    cuts = {name: np.array_split(each, min(3, len(each))) for name, each in digests.items()}
    parts = {name: [stage(tmp_path, f"{name}.{n}", c) for n, c in enumerate(each)] for name, each in cuts.items()}
    every = [part for each in parts.values() for part in each]
    whole = [stage(tmp_path, f"{name}.whole", each) for name, each in digests.items()]
    for seed in range(100):
        found = iter(roles_of(tmp_path, every, 0.02, seed))
        results = hold_out([[next(found) for _ in each] for each in parts.values()])
        expected = hold_out([[role] for role in roles_of(tmp_path, whole, 0.02, seed)])
        for name, mine, staged, [alone], one in zip(parts, results, parts.values(), expected, whole, strict=True):
            roles = np.concatenate([read_roles(*each) for each in zip(staged, mine, strict=True)])
            assert (roles == read_roles(one, alone)).all()
            documents = np.sum([each.documents for each in mine], axis=0)
            assert [int((roles == role).sum()) for role in range(3)] == documents.tolist()
            assert (np.sum([each.tokens for each in mine], axis=0) == 10 * documents).all()
            assert (np.sum([each.bytes for each in mine], axis=0) == 30 * documents).all()
            if name != "one":
                assert documents[1] >= 1 and documents[0] >= 1
    # A source that has held-out documents by chance keeps those, whatever the others have.
    assert (
        hold_out([roles_of(tmp_path, whole[:1], 0.02, 7)])[0]
        == hold_out([[role] for role in roles_of(tmp_path, whole, 0.02, 7)])[0]
    )


def test_fewer_than_two_distinct_documents_are_an_error(tmp_path: Path) -> None:
    parts = [stage(tmp_path, name, np.array([7], np.uint64)) for name in ("a", "b")]
    with pytest.raises(ValueError, match="fewer than two distinct documents"):
        hold_out([[role] for role in roles_of(tmp_path, parts, 0.5, 1)])


@pytest.mark.parametrize("num_groups", [1, 4, 256])
def test_duplicates_are_found_wherever_they_lie(
    tmp_path: Path, num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several runs a part.
    monkeypatch.setattr(digests_module, "_RUN_DOCUMENTS", 20_000)
    generator = np.random.default_rng(0)
    pool = generator.integers(0, 2**64, 100_000, np.uint64)
    digests = pool[generator.integers(0, len(pool), 200_000)]
    parts = [stage(tmp_path, str(n), each) for n, each in enumerate(np.split(digests, [50_000, 50_000, 120_000]))]
    roles = np.concatenate(
        [read_roles(*each) for each in zip(parts, roles_of(tmp_path, parts, 0.1, 1, num_groups), strict=True)]
    )
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    assert ((roles != 2) == first).all()
    held_out = (roles == 1).sum() / first.sum()
    assert abs(held_out - 0.1) < 0.005


def test_groups_of_buckets_hold_every_bucket_once_and_bound_memory() -> None:
    for num_documents in (0, 1, 4_000_000, 5_000_000, 10**8, 10**12):
        groups = groups_of_buckets(num_documents)
        assert [bucket for group in groups for bucket in group] == list(range(256))
        assert len(groups) == 256 or num_documents / len(groups) <= 1 << 22
