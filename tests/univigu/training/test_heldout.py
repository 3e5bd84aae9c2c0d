"""The held-out evaluation: what it says of a model that reads the video, and of one that doesn't."""

import pytest
import torch

from tiny_objective import LENGTH, alone, build, make_batch, take
from univigu.errors import ConfigError
from univigu.objective import training_loss
from univigu.training import heldout
from univigu.training.heldout import evaluate_heldout


@pytest.mark.slow
def test_video_gain_shows_whether_the_text_reads_the_video():
    """A model that is trained to tell two kinds of video apart gains from the video; an untrained one doesn't."""
    batch = make_batch(16)
    kind = torch.arange(16) % 2
    batch["latents"] = (2.0 * kind - 1)[:, None, None, None, None] + 0.1 * batch["latents"]
    batch["target_ids"] = torch.where(kind.bool()[:, None], 5, 9).repeat(1, LENGTH)
    model = build(zero_head=True)
    untrained = evaluate_heldout(model, [batch], bins=4)
    assert untrained["video_gain"] == 0
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        batch["epochs"] = torch.full((16,), step)
        loss = training_loss(model, batch, alone("understand"), step)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trained = evaluate_heldout(model, [take(batch, slice(0, 8)), take(batch, slice(8, 16))], bins=4)
    assert trained["token_accuracy"][0] > 0.9
    assert trained["video_gain"] > 0.05
    assert trained["samples"] == 16
    whole = evaluate_heldout(model, [batch], bins=4)
    assert whole["text_ce"] == pytest.approx(trained["text_ce"], rel=1e-3, abs=1e-5)
    assert len(whole["video_mse"]) == len(whole["tau"]) == 4


def test_all_times_in_one_batch_give_the_scores_of_one_after_the_other(monkeypatch):
    model, batch = build(), make_batch(4)
    together = evaluate_heldout(model, [batch], bins=4)
    monkeypatch.setattr(heldout, "SMALL_VIDEO", 0)
    for name, values in evaluate_heldout(model, [batch], bins=4).items():
        assert together[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


def test_evaluation_without_samples_is_refused():
    with pytest.raises(ConfigError, match="held-out"):
        evaluate_heldout(build(), [])
