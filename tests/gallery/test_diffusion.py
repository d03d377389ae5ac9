"""The entry on images: more ink after DPO than after SFT, and still the right digits."""

import diffusion
import jax
import numpy as np
import pytest
from shared import digits, intervals

from .as_users import computed


@pytest.fixture(scope="module")
def quick():
    # Optax's schedules mix integers and floats.
    return computed(diffusion, diffusion.QUICK)


def test_dpo_follows_the_preference_further_than_sft(quick):
    reference, sft, dpo = quick.ink.mean(-1).T
    assert (sft > reference + 0.003).all()
    assert (dpo > sft + 0.01).all()


def test_it_is_shown(quick):
    assert "DPO, beta 0.3" in diffusion.table(quick)
    assert len(diffusion.picture(quick).axes) == 2


def test_the_pairs_are_what_the_reader_says():
    images, labels = digits.load()
    chosen, rejected, label = digits.prefer(images, labels, jax.random.key(0), 3000)
    row = {bytes(image): c for image, c in zip(np.asarray(images), np.asarray(labels), strict=True)}
    for side in (chosen, rejected):
        assert [row[bytes(image)] for image in np.asarray(side)] == np.asarray(label).tolist()
    gap = np.abs(digits.ink(chosen) - digits.ink(rejected)) / digits.TEMPERATURE
    agreed = np.asarray(digits.ink(chosen) > digits.ink(rejected))
    sure = 1 / (1 + np.exp(-gap))
    surprise = agreed.mean() - sure.mean()
    assert abs(surprise) < 3 * np.sqrt((sure * (1 - sure)).mean() / 3000)


@pytest.mark.slow
def test_the_claims():
    results = computed(diffusion, diffusion.FULL)
    found = {name: intervals.interval(x) for name, x in diffusion.measures(results).items()}
    low = {name: mean - half for name, (mean, half) in found.items()}
    high = {name: mean + half for name, (mean, half) in found.items()}
    reference, sft, gentle = 0, 1, 2
    assert low["ink"][gentle] > high["ink"][sft] > low["ink"][sft] > high["ink"][reference]
    assert low["win rate"][gentle] > 0.95
    kept = found["digit asked for"][0]
    assert kept[gentle] > kept[reference] - 0.03
    assert found["KL of digits"][0][gentle] < 0.01
    # The price: less pull to the reference gives more ink, and fewer of the digits asked for.
    assert (np.diff(found["ink"][0][gentle:]) > 0).all()
    assert high["digit asked for"][-1] < low["digit asked for"][gentle]
