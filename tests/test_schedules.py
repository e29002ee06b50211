import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_prune.schedules import SCHEDULES, Constant, Cubic, Exponential, Harmonic, Linear

ALL = st.sampled_from(sorted(SCHEDULES)).map(SCHEDULES.get)
SPARSITY = st.floats(0.01, 0.999)
PROGRESS = st.floats(0, 1)


@given(ALL, st.floats(0, 1, exclude_max=True), st.floats(0, 1), st.integers(1, 400))
def test_schedules_grow_from_their_start_to_exactly_the_target(schedule, sparsity, part, num_steps):
    initial = part * sparsity
    values = [schedule(sparsity, initial)(step / num_steps) for step in range(num_steps + 1)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert all(0 <= value < 1 for value in values)
    assert values[0] == pytest.approx(sparsity if schedule is Constant else initial, abs=1e-12)
    assert values[-1] == sparsity


@given(SPARSITY, PROGRESS)
def test_exponential_is_equation_9_of_force(sparsity, alpha):
    m = 1e6
    kept = math.exp(alpha * math.log((1 - sparsity) * m) + (1 - alpha) * math.log(m))
    assert Exponential(sparsity)(alpha) == pytest.approx(1 - kept / m, abs=1e-12)


@given(SPARSITY, PROGRESS)
def test_linear_is_equation_8_of_force(sparsity, alpha):
    m = 1e6
    kept = alpha * (1 - sparsity) * m + (1 - alpha) * m
    assert Linear(sparsity)(alpha) == pytest.approx(1 - kept / m, abs=1e-12)


@given(SPARSITY, st.floats(0, 1), st.integers(0, 1000), st.integers(1, 100), st.integers(1, 100), st.data())
def test_cubic_is_equation_1_of_zhu_and_gupta(final, part, first_step, num_prunings, frequency, data):
    initial = part * final
    step = first_step + frequency * data.draw(st.integers(0, num_prunings))
    expected = final + (initial - final) * (1 - (step - first_step) / (num_prunings * frequency)) ** 3
    assert Cubic(final, initial)((step - first_step) / (num_prunings * frequency)) == pytest.approx(expected, abs=1e-12)


@given(SPARSITY, st.integers(1, 50))
def test_harmonic_removes_in_each_round_the_fraction_of_gradient_flows_code(p, n):
    density = 1.0
    for i in range(1, n + 1):
        density *= 1 - p / (i * p + n * (1 - p))
        assert Harmonic(p)(i / n) == pytest.approx(1 - density, abs=1e-9)


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_outside_the_way_is_an_error(progress):
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\]"):
        Exponential(0.5)(progress)


@pytest.mark.parametrize(("sparsity", "initial"), [(0.5, 0.6), (1.0, 0.0), (0.5, -0.1), (float("nan"), 0.0)])
def test_a_schedule_that_does_not_grow_is_an_error(sparsity, initial):
    with pytest.raises(ValueError, match="sparsity"):
        Cubic(sparsity, initial)
