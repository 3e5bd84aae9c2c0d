"""The path between noise and data: round trips, grids, and Euler's method."""

import pytest
import torch

from univigu import flow

TAU = torch.tensor([0.05, 0.4, 0.95])


@pytest.fixture
def path():
    generator = torch.Generator().manual_seed(0)
    noise, data = (torch.randn(3, 4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    return noise, data, flow.interpolate(noise, data, TAU), flow.velocity(noise, data)


def test_the_path_starts_at_noise_and_ends_at_data(path):
    noise, data, _, _ = path
    assert torch.equal(flow.interpolate(noise, data, 0.0), noise)
    assert torch.equal(flow.interpolate(noise, data, 1.0), data)


def test_velocity_data_and_noise_convert_into_each_other(path):
    noise, data, z, velocity = path
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(flow.velocity_to_data(velocity, z, TAU), data, **close)
    torch.testing.assert_close(flow.data_to_velocity(data, z, TAU), velocity, **close)
    torch.testing.assert_close(flow.velocity_to_noise(velocity, z, TAU), noise, **close)
    torch.testing.assert_close(flow.noise_to_velocity(noise, z, TAU), velocity, **close)
    torch.testing.assert_close(flow.data_to_noise(data, z, TAU), noise, **close)
    torch.testing.assert_close(flow.noise_to_data(noise, z, TAU), data, **close)
    anything = torch.randn_like(z)
    torch.testing.assert_close(flow.data_to_velocity(flow.velocity_to_data(anything, z, TAU), z, TAU), anything)
    torch.testing.assert_close(flow.noise_to_velocity(flow.velocity_to_noise(anything, z, TAU), z, TAU), anything)
    torch.testing.assert_close(flow.noise_to_data(flow.data_to_noise(anything, z, TAU), z, TAU), anything)


def test_the_floor_keeps_a_velocity_finite_at_the_end_of_the_path(path):
    _, data, z, _ = path
    ended = torch.ones(3)
    assert not flow.data_to_velocity(data, z, ended).isfinite().all()
    torch.testing.assert_close(flow.data_to_velocity(data, z, ended, 0.05), (data - z) / 0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_euler_solves_a_constant_field_exactly(path, steps, shift):
    noise, data, _, velocity = path
    (end,) = flow.integrate(lambda states, taus: (velocity,), [noise], [flow.tau_grid(steps, shift)])
    torch.testing.assert_close(end, data, rtol=0, atol=1e-6)


def test_coupled_states_each_move_on_their_own_grid():
    start = torch.zeros(1, 2)
    seen = []

    def field(states, taus):
        seen.append(tuple(round(float(tau), 4) for tau in taus))
        return states[1] + 1, states[0] * 0 + 2

    grids = [flow.tau_grid(2), flow.tau_grid(2, shift=3.0)]
    first, second = flow.integrate(field, [start, start], grids)
    assert seen == [(0.0, 0.0), (0.5, 0.25)]
    torch.testing.assert_close(second, torch.full((1, 2), 2.0))
    torch.testing.assert_close(first, torch.full((1, 2), 0.5 * 1 + 0.5 * 1.5))


def test_the_grid_is_wans_shift_of_sigma_in_the_papers_time():
    grid = flow.tau_grid(10, shift=5.0)
    sigma = torch.linspace(1, 0, 11)
    torch.testing.assert_close(grid, 1 - 5 * sigma / (1 + 4 * sigma))
    assert grid[0] == 0
    assert grid[-1] == 1
    assert (grid.diff() > 0).all()
    torch.testing.assert_close(flow.tau_grid(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))


def test_noise_of_a_sample_depends_on_its_key_alone():
    both = flow.keyed_noise([(0, "a"), (0, "b")], (3, 2))
    assert torch.equal(both[1], flow.keyed_noise([(0, "b")], (3, 2))[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(flow.keyed_noise([(1, 23)], (4,)), flow.keyed_noise([(12, 3)], (4,)))
