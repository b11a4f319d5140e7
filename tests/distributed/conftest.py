"""The ranks that cases of torch's frameworks share."""

from collections.abc import Iterator

import pytest

from distributed.side_by_side import WORLD_SIZES, Ranks


@pytest.fixture(scope="session")
def _ranks() -> Iterator[dict[int, Ranks]]:
    ranks = {world_size: Ranks(world_size) for world_size in WORLD_SIZES}
    yield ranks
    for each in ranks.values():
        each.close()


@pytest.fixture(params=WORLD_SIZES[1:], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, _ranks: dict[int, Ranks]) -> Ranks:
    """Of every world size above 1 in turn."""
    return _ranks[request.param]


@pytest.fixture(params=WORLD_SIZES, ids="{} ranks".format)
def one_or_more(request: pytest.FixtureRequest, _ranks: dict[int, Ranks]) -> Ranks:
    """Of every world size in turn: where a world of one is a case of its own."""
    return _ranks[request.param]


@pytest.fixture
def two_ranks(_ranks: dict[int, Ranks]) -> Ranks:
    return _ranks[2]


@pytest.fixture
def four_ranks(_ranks: dict[int, Ranks]) -> Ranks:
    return _ranks[4]
