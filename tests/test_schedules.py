import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_prune.schedules import SCHEDULES, Exponential, Linear

ALL = st.sampled_from(sorted(SCHEDULES)).map(SCHEDULES.get)


@given(ALL, st.floats(0, 1, exclude_max=True), st.integers(1, 400))
def test_schedules_grow_and_end_at_exactly_the_target(schedule, sparsity, num_steps):
    values = [schedule(sparsity, num_steps)(step) for step in range(1, num_steps + 1)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert all(0 <= value < 1 for value in values)
    assert values[-1] == sparsity


@given(st.floats(0.01, 0.999), st.integers(2, 300), st.data())
def test_exponential_is_equation_9_of_force(sparsity, num_steps, data):
    step, m = data.draw(st.integers(1, num_steps)), 1e6
    alpha = step / num_steps
    kept = math.exp(alpha * math.log((1 - sparsity) * m) + (1 - alpha) * math.log(m))
    assert Exponential(sparsity, num_steps)(step) == pytest.approx(1 - kept / m, abs=1e-12)


@given(st.floats(0.01, 0.999), st.integers(2, 300), st.data())
def test_linear_is_equation_8_of_force(sparsity, num_steps, data):
    step, m = data.draw(st.integers(1, num_steps)), 1e6
    alpha = step / num_steps
    kept = alpha * (1 - sparsity) * m + (1 - alpha) * m
    assert Linear(sparsity, num_steps)(step) == pytest.approx(1 - kept / m, abs=1e-12)


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, None])
def test_a_wrong_number_of_steps_says_what_it_got(num_steps):
    with pytest.raises(ValueError, match=r"num_steps must be an integer of at least 1, got"):
        Linear(0.5, num_steps)


@pytest.mark.parametrize("step", [0, 4])
def test_a_step_outside_the_schedule_is_an_error(step):
    with pytest.raises(ValueError, match=r"step must be in \[1, 3\]"):
        Exponential(0.5, 3)(step)
