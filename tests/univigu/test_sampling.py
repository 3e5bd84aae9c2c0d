"""Guidance: both branches in one batch, or in two calls, are the same velocities."""

import pytest
import torch

from univigu import sampling
from univigu.sampling import Guide, joint_field, video_field
from univigu.transformer import UniViGUTransformer3DModel

VIDEO, TEXT = (4, 3, 8, 6), (12, 16)
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    wan = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 32}
    text = {"vocab_size": 60, "tokenizer_length": 58, "text_latent_dim": TEXT[1], "text_length": TEXT[0]}
    model = UniViGUTransformer3DModel(**wan, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64, **text).eval()
    torch.nn.init.normal_(model.text_head.proj_out.weight)
    torch.nn.init.normal_(model.text_embedder.proj_guess.weight)
    return model


def in_turn_and_together(monkeypatch, model, sample):
    """The results of a sample with a call for each branch, and with one for both; the calls of the second."""
    monkeypatch.setattr(sampling, "TOGETHER", 0)
    in_turn = sample()
    monkeypatch.undo()
    calls = []
    with torch.no_grad(), model.register_forward_pre_hook(lambda *given: calls.append(len(given[1][0]))) as _:
        together = sample()
    return in_turn, together, calls


@pytest.mark.parametrize("beside", [True, False], ids=["beside a text", "without text"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_guided_video(model, monkeypatch, beside, rows):
    torch.manual_seed(1)
    z, text = torch.randn(2, *VIDEO), torch.randn(2, *TEXT) if beside else None
    guide = Guide(torch.randn(rows, 10, 32), torch.randn(1, 10, 32), 3.0)

    def sample():
        with torch.no_grad():
            return video_field(model, text, 0.8, SEEDS, guide)(z, 0.3)

    in_turn, together, calls = in_turn_and_together(monkeypatch, model, sample)
    torch.testing.assert_close(together, in_turn, atol=1e-5, rtol=1e-5)
    assert calls == [2]  # one call, with each video once


def test_a_guided_video_and_its_text_with_the_guesses_of_earlier_steps(model, monkeypatch):
    torch.manual_seed(2)
    video, text, tau = torch.randn(2, *VIDEO), torch.randn(2, *TEXT), torch.tensor(0.4)
    guide = Guide(torch.randn(2, 10, 32), torch.randn(1, 10, 32), 2.0)

    def sample():
        with torch.no_grad():
            field = joint_field(model, VIDEO, TEXT, SEEDS, guide, 1.5, 0.5)
            return [field((video, text), (tau, tau)) for _ in range(2)]

    in_turn, together, calls = in_turn_and_together(monkeypatch, model, sample)
    torch.testing.assert_close(together, in_turn, atol=1e-4, rtol=1e-4)
    assert calls == [2, 2, 2, 2]  # the text's own branch has another video, and a call of its own


def test_in_lockstep_each_modality_is_guided_by_what_the_other_adds_and_not_at_all_up_to_a_scale_of_1(model):
    """u = u_without + scale * (u_with - u_without) is affine in the scale; the text has its own scale."""
    torch.manual_seed(2)
    states, tau = (torch.randn(2, *VIDEO), torch.randn(2, *TEXT)), torch.tensor(0.4)
    condition, empty = torch.randn(2, 10, 32), torch.randn(1, 10, 32)

    def sample(video_scale, text_scale):
        with torch.no_grad():
            guide = Guide(condition, empty, video_scale)
            return joint_field(model, VIDEO, TEXT, SEEDS, guide, text_scale, 1.0)(states, (tau, tau))

    plain = sample(1.0, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(plain, sample(0.0, 0.0), strict=True))
    (two, _), (three, _) = sample(2.0, 1.0), sample(3.0, 1.0)
    torch.testing.assert_close(three - two, two - plain[0], atol=1e-4, rtol=1e-4)
    assert (two - plain[0]).abs().max() > 1e-3
    video, text = sample(1.0, 2.0)
    assert torch.equal(video, plain[0])
    assert (text - plain[1]).abs().max() > 1e-3


def test_a_negative_prompt_of_another_length_has_a_call_of_its_own(model, monkeypatch):
    guide = Guide(torch.randn(1, 10, 32), torch.randn(1, 7, 32), 3.0)
    z = torch.randn(2, *VIDEO)

    def sample():
        with torch.no_grad():
            return video_field(model, None, 1.0, SEEDS, guide)(z, 0.3)

    in_turn, together, calls = in_turn_and_together(monkeypatch, model, sample)
    torch.testing.assert_close(together, in_turn)
    assert calls == [2, 2]


@pytest.mark.parametrize("together", [0, 10**6], ids=["in turn", "in one batch"])
def test_the_condition_is_projected_once_unless_it_changes(model, monkeypatch, together):
    monkeypatch.setattr(sampling, "TOGETHER", together)
    torch.manual_seed(3)
    z, text = torch.randn(2, *VIDEO), torch.randn(2, *TEXT)
    guide = Guide(torch.randn(2, 10, 32), torch.randn(1, 10, 32), 3.0)
    field, calls = video_field(model, text, 0.8, SEEDS, guide), []
    each = 1 if together else 2

    def step(tau):
        again = video_field(model, text, 0.8, SEEDS, guide)(z, tau)
        with model.blocks[1].attn2.to_k.register_forward_hook(lambda *_: calls.append(1)):
            torch.testing.assert_close(field(z, tau), again, atol=1e-5, rtol=1e-5)
        return len(calls)

    with torch.no_grad():
        assert [step(tau) for tau in (0.1, 0.4)] == [each, each]
        guide.condition = guide.condition + 1  # as a callback may
        assert step(0.5) > each
        before = len(calls)
        guide.condition.mul_(2)
        assert step(0.6) > before


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_beside_a_text_is_the_joint_forward_without_the_end_of_the_text(model, rows):
    torch.manual_seed(4)
    z, text, c = torch.randn(rows, *VIDEO), torch.randn(rows, *TEXT), torch.randn(1, 10, 32)
    tau, text_tau = torch.full((rows,), 0.3), torch.ones(rows)
    with torch.no_grad():
        velocity = video_field(model, text, 1.0, SEEDS[:rows], Guide(c, None, 1.0))(z, 0.3)
        torch.testing.assert_close(velocity, model(z, tau, c, text, text_tau).video, atol=1e-5, rtol=1e-5)
        called = []
        for block in model.blocks:
            block.ffn_text.register_forward_hook(lambda *_: called.append(1))
        assert model(z, tau, c, text, text_tau, attention="video_only").text is None
    assert len(called) == len(model.blocks) - 1
