"""The same parameters and metrics over every mesh and by every road as on one device."""

import functools

import pytest

from dpo_eqx import sharding

from ..policies import arrays
from .grid import ROADS, VARIANTS, alone, deviation, problem

TOLERANCE = 1e-9
MESHES = ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"]
wanted = functools.cache(alone)


def check(road, sizes, variant):
    got = ROADS[road](VARIANTS[variant], sharding.make_mesh(sizes))
    want = wanted(VARIANTS[variant])
    found = deviation(got, want)
    print(f"{road:10} {sizes:22} {variant:23} {found:.1e}")
    assert found < TOLERANCE
    before = arrays(problem(VARIANTS[variant])[0])
    assert deviation(want[0], before) > 1e-3, "the step has moved nothing"


def test_the_one_with_most_in_it():
    check("filter_jit", "data=2,fsdp=2,tensor=2", "coupled in microbatches")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("road", "sizes"),
    [("filter_jit", sizes) for sizes in MESHES]
    + [("shard_map", "data=8"), ("shard_map", "fsdp=8"), ("shard_map", MESHES[-1])]
    + [("pmap", "data=8")],
)
def test_all(road, sizes, variant):
    check(road, sizes, variant)
