"""The loss of training samples."""

from dataclasses import replace

import pytest
import torch

from tiny_objective import DEFAULT, LENGTH, VOCABULARY, alone, build, make_batch, take
from univigu import flow, objective, tasks, text_space
from univigu.objective import TrainingObjective, training_loss
from univigu.tasks import TASKS, ObjectiveConfig, draw_plan, draw_step

LITERAL = ObjectiveConfig(shares={"joint": 1.0}, form="literal", self_conditioning=0.0)


def test_a_samples_draws_do_not_depend_on_its_batch_but_on_the_epoch():
    table = build().text_space().detach()
    whole = tasks.prepare(make_batch(8), table, DEFAULT)
    part = tasks.prepare(take(make_batch(8), slice(5, 8)), table, DEFAULT)
    for name, tensor in vars(part).items():
        assert torch.equal(tensor, getattr(whole, name)[5:8]), name
    later = tasks.prepare(make_batch(8, epoch=1), table, DEFAULT)
    assert not torch.equal(later.video_noise, whole.video_noise)
    assert not torch.equal(later.text_tau, whole.text_tau)
    other_seed = tasks.prepare(make_batch(8), table, replace(DEFAULT, seed=1))
    assert not torch.equal(other_seed.text_noise, whole.text_noise)


@torch.no_grad()
@pytest.mark.parametrize(("self_conditioning", "text_draws"), [(0.0, 1), (1.0, 1), (1.0, 3)])
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(self_conditioning, text_draws):
    model, batch = build(), make_batch(16)
    torch.nn.init.normal_(model.text_embedder.proj_guess.weight)
    config = replace(DEFAULT, self_conditioning=self_conditioning, text_draws=text_draws)
    whole = training_loss(model, batch, config, 0)
    halves = [training_loss(model, take(batch, rows), config, 0)["loss"] for rows in (slice(0, 8), slice(8, 16))]
    torch.testing.assert_close(whole["loss"], sum(halves) / 2, atol=1e-5, rtol=1e-5)


def all_draws(batch, table, config):
    """The batch's samples with each draw of their texts."""
    own, keys = tasks.prepare(batch, table, config), tasks.sample_keys(batch, config)
    return [own, *(tasks.redraw_texts(own, keys, draw, config) for draw in range(1, config.text_draws))]


def test_draws_of_a_text_share_the_video_and_nothing_else():
    table, batch = build().text_space().detach(), make_batch(64)
    config = replace(alone("understand"), text_draws=3, text_shift=2.0)
    draws = all_draws(batch, table, config)
    for drawn in draws:
        assert drawn.z_video is draws[0].z_video
        assert drawn.text_tau.unique().numel() == 64
        assert flow.shift_tau(drawn.text_tau, 0.5).mean() == pytest.approx(0.5, abs=0.12)  # undoes the shift
        torch.testing.assert_close(drawn.z_text, flow.interpolate(drawn.text_noise, drawn.text_data, drawn.text_tau))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for name in ("text_tau", "text_noise"):
            both = torch.stack([getattr(draws[n], name).flatten() for n in (one, other)])
            assert abs(both.corrcoef()[0, 1]) < 0.3, name
    part = all_draws(take(batch, slice(5, 8)), table, config)  # no draw depends on the rest of the batch
    assert all(torch.equal(few.z_text, many.z_text[5:8]) for few, many in zip(part, draws, strict=True))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("self_conditioning", [0.0, 1.0])
@pytest.mark.parametrize("text_draws", [1, 3])
def test_several_draws_give_the_mean_of_the_losses_and_gradients_of_single_ones(
    text_draws, self_conditioning, recomputed
):
    model, batch = build(), make_batch(6)
    torch.nn.init.normal_(model.text_embedder.proj_guess.weight)
    if recomputed:
        model.enable_gradient_checkpointing()
    weights = torch.rand(VOCABULARY + 2, generator=torch.Generator().manual_seed(0))
    config = replace(alone("understand"), text_draws=text_draws, self_conditioning=self_conditioning)
    table = model.text_space()
    singles, sums = [], {}
    for drawn in all_draws(batch, table, config):
        hidden = objective.predict_prefix(model, [drawn], table, guessing=self_conditioning > 0)
        loss, parts = objective.text_losses(hidden, drawn, table, model, config, weights)
        singles.append(loss.mean() / text_draws)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.mean() / text_draws
    sum(singles).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert expected["patch_embedding.weight"].any()  # the video learns through its keys and values
    model.zero_grad()
    out = training_loss(model, batch, config, 0, weights)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], sum(singles), atol=1e-5, rtol=1e-5)
    for name, value in sums.items():
        torch.testing.assert_close(out[name], value.detach(), atol=1e-5, rtol=1e-5)
    assert out["text_samples"] == 6
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)
    if text_draws == 1:
        assert torch.equal(out["loss"], singles[0])


def test_only_texts_beside_a_given_video_have_several_draws():
    model, batch = build(), make_batch(16)
    once, thrice = (replace(DEFAULT, self_conditioning=0.0, text_draws=draws) for draws in (1, 3))
    understood = (draw_plan(objective_keys(batch), once).task == list(TASKS).index("understand")).nonzero()[:, 0]
    lengths = []
    model.text_embedder.register_forward_hook(lambda module, args, output: lengths.append(len(args[0])))
    with torch.no_grad():
        losses = [training_loss(model, batch, config, 0)["loss"] for config in (once, thrice)]
        few = take(batch, understood)
        alone_losses = [training_loss(model, few, config, 0)["loss"] for config in (once, thrice)]
    assert lengths[2:4] == [3 * len(understood), 16 - len(understood)]
    change, expected = losses[1] - losses[0], (alone_losses[1] - alone_losses[0]) * len(understood) / 16
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5)
    assert abs(change) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prediction", text_space.PREDICTIONS)
def test_the_literal_loss_by_the_video_tokens_is_the_sum_of_two_per_token_means(prediction):
    """Eq 11: lambda_t = |z_v| / |z_t| weighs each modality per token, with squares summed over channels."""
    model, batch = build(prediction), make_batch(32)
    table = model.text_space()
    rows = (tasks.prepare(batch, table, LITERAL).text_tau <= 0.95).nonzero()[:, 0]
    assert len(rows) > 20
    batch = take(batch, rows)
    s = tasks.prepare(batch, table, LITERAL)
    out = model(s.z_video, s.video_tau, s.condition, s.z_text, s.text_tau)
    text = model.read_text(out.text, s.z_text, s.text_tau, table).velocity
    video_tokens = 2 * (4 // 2) * (4 // 2)
    video = (out.video - (s.latents - s.video_noise)).square().sum((1, 2, 3, 4)) / video_tokens
    text = (text - (table[s.ids] - s.text_noise)).square().sum(2).mean(1)
    literal = training_loss(model, batch, LITERAL, 0)["loss"]
    torch.testing.assert_close(literal / video_tokens, (video + text).mean(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_weighted_loss_is_the_sum_of_its_parts():
    model, batch = build(), make_batch(8)
    config = replace(alone("joint"), self_conditioning=0.0, video_weight=0.3, text_weight=0.1, ce_weight=1.0)
    out = training_loss(model, batch, config, 0)
    expected = 0.3 * out["video_mse"] + 0.1 * out["text_mse"] + out["text_ce"]
    torch.testing.assert_close(out["loss"], expected, atol=1e-5, rtol=1e-5)
    assert out["video_samples"] == out["text_samples"] == 8


@torch.no_grad()
def test_token_weights_weight_the_cross_entropy():
    model, batch = build(), make_batch(8)
    weights = torch.ones(VOCABULARY + 2)
    config = replace(alone("understand"), text_weight=0.0)
    flat = training_loss(model, batch, config, 0)
    assert torch.equal(flat["loss"], training_loss(model, batch, config, 0, weights)["loss"])
    assert flat["loss"] == pytest.approx(float(flat["text_ce"]), rel=1e-5)
    weights[:] = 0
    weights[0] = 1.0
    pad_only = training_loss(model, batch, config, 0, weights)
    assert float(pad_only["text_ce"]) == pytest.approx(float(flat["text_ce"]), rel=1e-5)
    assert abs(pad_only["loss"] - flat["loss"]) > 1e-3


@torch.no_grad()
def test_understanding_never_sees_the_prompt():
    model, batch = build(), make_batch(8)
    blind = batch | {"prompt_embeds": batch["prompt_embeds"] + 1, "prompt_ids": batch["prompt_ids"].flip(0)}
    config = alone("understand")
    assert torch.equal(training_loss(model, batch, config, 0)["loss"], training_loss(model, blind, config, 0)["loss"])
    moved = batch | {"latents": batch["latents"] + 1}
    assert training_loss(model, moved, config, 0)["loss"] != training_loss(model, batch, config, 0)["loss"]


@pytest.mark.parametrize(("task", "video", "text"), [("understand", 0, 8), ("generate", 8, 0), ("joint", 8, 8)])
def test_a_modality_at_its_clean_corner_has_no_loss(task, video, text):
    model, batch = build(), make_batch(8)
    out = training_loss(model, batch, alone(task), 0)
    assert (int(out["video_samples"]), int(out["text_samples"])) == (video, text)
    out["loss"].backward()
    assert bool(model.proj_out.weight.grad.any()) == (video > 0)
    assert bool(model.text_head.proj_out.weight.grad.any()) == (text > 0)
    # the shared attention learns from both
    assert model.blocks[0].attn1.to_k.weight.grad.abs().sum() > 0


def test_the_flow_loss_has_no_gradient_through_the_target():
    """E learns through the model's input and output; only in the literal form does the target have a gradient."""

    def target_moves(config):
        model = build("x1")
        s = tasks.prepare(make_batch(4), model.text_space(), config)
        said, seen = torch.zeros(4, LENGTH, 8), replace(s, z_text=s.z_text.detach())
        loss, _ = objective.text_losses(said, seen, model.text_space().detach(), model, config, None)
        return loss.requires_grad

    assert not target_moves(alone("joint"))
    assert target_moves(LITERAL)


def test_self_conditioning_has_its_share_of_steps_identically_for_all_batches():
    calls = []
    model = build()
    model.text_embedder.register_forward_hook(
        lambda module, args, output: calls.append(args[2] is not None and bool(args[2].any()))
    )
    with torch.no_grad():
        happened = []
        for step in range(40):
            calls.clear()
            training_loss(model, make_batch(2), alone("understand"), step)
            happened.append(any(calls))
            assert len(calls) == 2 * (1 + any(calls))  # for the samples, and for the policy without samples
    assert 10 < sum(happened) < 30


def test_a_text_that_is_given_has_no_guess():
    seen = []
    model = build()
    model.text_embedder.register_forward_hook(lambda module, args, output: seen.append(args[2]))
    batch, config = make_batch(16), replace(DEFAULT, shares={"joint": 1.0, "generate": 1.0}, self_conditioning=1.0)
    with torch.no_grad():
        training_loss(model, batch, config, 0)
    given = draw_plan(objective_keys(batch), config).task == list(TASKS).index("generate")
    assert 0 < given.sum() < 16
    used = seen[-1].abs().sum((1, 2)) > 0
    assert torch.equal(used, ~given)


@pytest.mark.parametrize("self_conditioning", [0.0, 1.0])
def test_every_batch_uses_all_weights_whatever_its_tasks(self_conditioning):
    ways = []
    for shares in (DEFAULT.shares, *({task: 1.0} for task in TASKS)):
        model, way = build(), []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name, way=way: way.append(name))
        config = replace(DEFAULT, shares=shares, self_conditioning=self_conditioning)
        training_loss(model, make_batch(), config, 0)["loss"].backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        ways.append(way)
    assert all(way == ways[0] for way in ways)


STEP = replace(DEFAULT, task_draw="step")


def step_of(task, guessing):
    return next(step for step in range(1, 200) if draw_step(step, STEP) == (task, guessing))


@pytest.mark.parametrize("guessing", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_of_one_task_has_the_loss_and_gradients_of_samples_that_all_drew_it(task, guessing):
    model, batch = build(), make_batch(6)
    torch.nn.init.normal_(model.text_embedder.proj_guess.weight)
    found = []
    for config in (STEP, replace(alone(task), self_conditioning=float(guessing))):
        out = training_loss(model, batch, config, step_of(task, guessing))
        out["loss"].backward()
        found.append((out["loss"], {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[1][1].items():  # the dummy pass of the other policy gives weights a gradient of zeros
        ours = found[0][1][name]
        torch.testing.assert_close(torch.zeros_like(gradient) if ours is None else ours, gradient, atol=1e-6, rtol=1e-4)


def count_calls(model, names):
    calls = {}
    for name in names:
        hook = lambda module, inputs, output, name=name: calls.update({name: calls.get(name, 0) + 1})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    return calls


@pytest.mark.parametrize(
    ("task", "guessing", "blocks", "heads"),
    [
        ("understand", False, 1, 1),
        ("understand", True, 3, 2),  # the video, the guess, the text
        ("joint", False, 1, 1),
        ("joint", True, 2, 2),
        ("generate", False, 1, 1),
        ("generate", True, 1, 1),
    ],
)
def test_a_step_of_one_task_passes_the_weights_as_often_as_the_task_needs(task, guessing, blocks, heads):
    model = build()
    calls = count_calls(model, ["blocks.0", "text_head", "proj_out"])
    training_loss(model, make_batch(), STEP, step_of(task, guessing))
    assert calls == {"blocks.0": blocks, "text_head": heads} | ({"proj_out": blocks} if task != "understand" else {})


@pytest.mark.parametrize("text_draws", [1, 3])
def test_recomputed_keys_and_values_give_the_loss_and_gradients_of_kept_ones(text_draws):
    batch, found = make_batch(6), []
    config = replace(alone("understand"), self_conditioning=1.0, text_draws=text_draws)
    for recomputed in (False, True):
        model = build()
        torch.nn.init.constant_(model.text_embedder.proj_guess.weight, 0.1)
        if recomputed:
            model.enable_gradient_checkpointing()
        out = training_loss(model, batch, config, 0)
        out["loss"].backward()
        found.append((out["loss"].detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-4)


def objective_keys(batch):
    return [(0, 0, i) for i in batch["sample_ids"].tolist()]


def test_near_tau_1_no_gradient_is_denormal():
    model, seen = build(), []
    model.text_head.register_full_backward_hook(lambda module, inner, outer: seen.append(outer[0].abs()))
    config = replace(alone("understand"), text_shift=1e-3)  # nearly all times near 1
    training_loss(model, make_batch(64), config, step=0)["loss"].backward()
    grads = torch.cat([grad.flatten() for grad in seen])
    assert grads.max() > 1e-6
    assert not ((grads > 0) & (grads < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.slow
def test_a_few_steps_teach_a_few_samples():
    model, batch = build(zero_head=True), make_batch(8)
    engine = TrainingObjective(model, DEFAULT)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(60):
        out = engine(batch, step)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        losses.append(out["loss"].item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_text_noise_does_not_depend_on_the_latents_shape():
    """Text noise is drawn from its own key, so a larger video does not change it."""
    table, batch = build().text_space().detach(), make_batch(4)
    small = tasks.prepare(batch, table, DEFAULT)
    large = tasks.prepare(batch | {"latents": torch.zeros(4, 4, 3, 8, 8)}, table, DEFAULT)
    assert torch.equal(small.text_noise, large.text_noise)
    torch.testing.assert_close(small.z_text, flow.interpolate(small.text_noise, table[small.ids], small.text_tau))
