"""Random states are kept around what draws and seeds, also if it fails."""

import random

import numpy as np
import pytest
import torch
from transformers import set_seed

from hyperadapt.randomness import randomness_kept


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_states_are_put_back() -> None:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    with randomness_kept([]):
        set_seed(0)
    with pytest.raises(ValueError, match="Seed"), randomness_kept([]):
        np.random.seed(drawn() and -1)
    assert drawn() == expected
