"""The transformer: Wan's own output without text, two streams with it, and the cost of captioning."""

import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from univigu import flow, layers, wan
from univigu.errors import BadInputError, ConfigError, CorruptDataError
from univigu.transformer import UniViGUTransformer3DModel

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}
TEXT = {"vocab_size": 60, "tokenizer_length": 58, "text_latent_dim": 16, "text_length": 12}
TAU, TEXT_TAU = torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.6])


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return WanTransformer3DModel(**TINY).eval()


def build(base, **config):
    """A model on the base whose text head and guess projection are not zero."""
    torch.manual_seed(1)
    model = UniViGUTransformer3DModel.from_wan(base, **(TEXT | config))
    torch.nn.init.normal_(model.text_head.proj_out.weight)
    torch.nn.init.normal_(model.text_embedder.proj_guess.weight)
    return model


@pytest.fixture(scope="module")
def model(base):
    return build(base)


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 4, 3, 8, 6), torch.randn(2, 10, 32), torch.randn(2, 12, 16), torch.randn(2, 12, 16)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_without_text_the_output_is_wans_bit_for_bit(base, model, inputs):
    video, condition, _, _ = inputs
    theirs = base(video, wan.wan_timestep(TAU), condition).sample
    ours = model(video, TAU, condition)
    assert torch.equal(ours.video, -theirs)
    assert ours.text is None


@pytest.mark.parametrize("attention", ["joint", "prefix", "video_only"])
def test_a_cpu_computes_the_tokens_in_parts_with_the_same_result(model, inputs, monkeypatch, attention):
    video, condition, text, guess = inputs
    whole = model(video, TAU, condition, text, TEXT_TAU, guess, attention)
    calls = []
    with model.blocks[1].ffn.register_forward_hook(lambda *_: calls.append(1)):
        monkeypatch.setattr(layers, "CPU_TOKENS", 14)  # 7 of the 36 tokens of each of two videos
        parts = model(video, TAU, condition, text, TEXT_TAU, guess, attention)
    assert len(calls) == 6
    torch.testing.assert_close(parts.video, whole.video, atol=1e-5, rtol=1e-5)
    if attention != "video_only":
        torch.testing.assert_close(parts.text, whole.text, atol=1e-4, rtol=1e-5)


def test_under_prefix_the_video_is_wans_bit_for_bit_beside_a_text(base, model, inputs):
    video, condition, text, guess = inputs
    theirs = base(video, wan.wan_timestep(TAU), condition).sample
    assert torch.equal(model(video, TAU, condition, text, TEXT_TAU, guess, "prefix").video, -theirs)


def test_under_joint_each_stream_sees_the_other(model, inputs):
    video, condition, text, _ = inputs
    out = model(video, TAU, condition, text, TEXT_TAU)
    other_text = model(video, TAU, condition, text + 1, TEXT_TAU)
    other_video = model(video + 1, TAU, condition, text, TEXT_TAU)
    assert (out.video - other_text.video).abs().max() > 1e-4
    assert (out.text - other_video.text).abs().max() > 1e-4


@pytest.mark.parametrize("attention", ["joint", "prefix"])
def test_samples_of_a_batch_do_not_see_each_other(model, inputs, attention):
    video, condition, text, guess = inputs
    both = model(video, TAU, condition, text, TEXT_TAU, guess, attention)
    for i in range(2):
        one = slice(i, i + 1)
        alone = model(video[one], TAU[one], condition[one], text[one], TEXT_TAU[one], guess[one], attention)
        torch.testing.assert_close(alone.video, both.video[one], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.text, both.text[one], atol=1e-4, rtol=1e-5)


def test_text_beside_a_cached_video_is_the_prefix_forward(model, inputs):
    video, condition, text, guess = inputs
    cache = model.prefill_video(video, TAU, condition)
    for i in range(3):
        whole = model(video, TAU, condition, text + i, TEXT_TAU, guess, "prefix").text
        torch.testing.assert_close(model.denoise_text(text + i, TEXT_TAU, cache, guess), whole, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("conditions", [1, 2])
def test_several_texts_share_each_cached_video(model, inputs, conditions):
    video, condition, text, guess = inputs
    cache = model.prefill_video(video, TAU, condition[:conditions])
    texts, taus = [text, text + 1, text.flip(0)], [TEXT_TAU, TEXT_TAU / 2, TEXT_TAU.flip(0)]
    together = model.denoise_text(torch.cat(texts), torch.cat(taus), cache, guess.repeat(3, 1, 1))
    singly = [model.denoise_text(each, tau, cache, guess) for each, tau in zip(texts, taus, strict=True)]
    torch.testing.assert_close(together, torch.cat(singly), atol=1e-5, rtol=1e-5)


def test_a_single_condition_serves_a_whole_batch(model, inputs):
    video, condition, text, _ = inputs
    one = model(video, TAU, condition[:1], text, TEXT_TAU)
    copied = model(video, TAU, condition[:1].expand(2, -1, -1), text, TEXT_TAU)
    torch.testing.assert_close(one.video, copied.video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.text, copied.text, atol=1e-5, rtol=1e-5)


def test_the_guess_has_an_effect_only_after_training(base, model, inputs):
    video, condition, text, guess = inputs
    without = model(video, TAU, condition, text, TEXT_TAU).text
    assert (model(video, TAU, condition, text, TEXT_TAU, guess).text - without).abs().max() > 1e-3
    torch.manual_seed(1)
    fresh = UniViGUTransformer3DModel.from_wan(base, **TEXT)
    hidden = fresh(video, TAU, condition, text, TEXT_TAU, guess).text
    assert (hidden == 0).all()
    torch.nn.init.normal_(fresh.text_head.proj_out.weight)
    with_guess = fresh(video, TAU, condition, text, TEXT_TAU, guess).text
    assert torch.equal(with_guess, fresh(video, TAU, condition, text, TEXT_TAU).text)


def test_text_is_on_the_diagonal_after_the_video(model):
    grid = (3, 4, 5)
    turns = model.rope.text(grid, 2)
    split = [model.rope.t_dim, model.rope.h_dim, model.rope.w_dim]
    for i, place in enumerate((5, 6)):
        for got, table in ((turns[..., 0], model.rope.freqs_cos), (turns[..., 1], model.rope.freqs_sin)):
            axes = [axis[place] for axis in table.split(split, dim=1)]
            assert torch.equal(got[0, i, 0], torch.cat(axes)[::2])


def test_a_text_beyond_the_rotary_tables_is_refused(model):
    model.rope.text((3, 60, 5), 4)
    with pytest.raises(BadInputError, match="shorter text_length"):
        model.rope.text((3, 60, 5), 5)


def test_the_text_side_starts_as_a_copy_of_the_videos_time(base, inputs):
    model = build(base, ffn_init="copy")
    for block in model.blocks:
        assert torch.equal(block.text_scale_shift_table, block.scale_shift_table)
        assert torch.equal(block.ffn_text.net[2].weight, block.ffn.net[2].weight)
        assert block.ffn_text.net[2].weight.data_ptr() != block.ffn.net[2].weight.data_ptr()
    time = model.text_embedder(inputs[2], TAU, None)[1]
    theirs = base.condition_embedder(wan.wan_timestep(TAU), inputs[1])[0]
    torch.testing.assert_close(time, theirs)
    fresh = build(base, ffn_init="new")
    assert not torch.equal(fresh.blocks[0].ffn_text.net[2].weight, fresh.blocks[0].ffn.net[2].weight)


def test_a_shared_network_serves_both_streams_and_the_video_stays_wans(base, inputs):
    model, copied = build(base, ffn_init="shared"), build(base, ffn_init="copy")
    unused = model.load_state_dict(copied.state_dict(), strict=False).unexpected_keys
    assert unused
    assert all(".ffn_text." in name for name in unused)
    video, condition, text, guess = inputs
    with torch.no_grad():
        ours, theirs = (each(video, TAU, condition, text, TEXT_TAU, guess) for each in (model, copied))
    assert torch.equal(ours.video, theirs.video)
    assert torch.equal(ours.text, theirs.text)


@torch.no_grad()
def test_a_model_that_captions_jointly_gives_the_joint_forward_through_the_same_calls(base, inputs):
    model = build(base, caption_attention="joint")
    video, condition, text, guess = inputs
    joint = model(video, TAU, condition, text, TEXT_TAU, guess, "joint").text
    seen = model(video, TAU, condition, attention="kv_only").cache
    assert torch.equal(model(seen, text=text, text_tau=TEXT_TAU, guess=guess).text, joint)
    assert torch.equal(model(video, TAU, condition, text, TEXT_TAU, guess, "text_only").text, joint)
    both = model.denoise_text(text.repeat(2, 1, 1), TEXT_TAU.repeat(2), seen, guess.repeat(2, 1, 1))
    torch.testing.assert_close(both, torch.cat([joint, joint]), atol=1e-5, rtol=1e-5)
    prefix = model(video, TAU, condition, text, TEXT_TAU, guess, "prefix").text
    assert not torch.allclose(joint, prefix, atol=1e-3)


def test_a_wan_folder_loads_unchanged(tiny_wan_folder):
    theirs = WanTransformer3DModel.from_pretrained(tiny_wan_folder / "transformer")
    model = UniViGUTransformer3DModel.from_wan(tiny_wan_folder, text_latent_dim=16, prediction="x1")
    state = theirs.state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    rows = wan.token_rows(tiny_wan_folder)
    assert model.config.vocab_size == len(rows)
    assert model.config.prediction == "x1"
    # E starts from the encoder's own rows: neighbours there are neighbours here
    far, near = (
        torch.nn.functional.normalize(t.float() - t.float().mean(0), dim=1) for t in (rows, model.text_space())
    )
    pairs = torch.triu_indices(len(rows), len(rows), 1)
    there, here = ((t @ t.T)[pairs[0], pairs[1]] for t in (far, near))
    assert torch.corrcoef(torch.stack([there, here]))[0, 1] > 0.5


@pytest.mark.parametrize("lost", ["blocks.0.ffn.net.2.bias", "scale_shift_table"])
def test_a_checkpoint_with_a_weight_missing_is_refused(tiny_wan_folder, tmp_path, lost):
    shutil.copytree(tiny_wan_folder / "transformer", tmp_path / "transformer")
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    state = load_file(file)
    del state[lost]
    save_file(state, file)
    with pytest.raises(BadInputError):
        UniViGUTransformer3DModel.from_wan(tmp_path)


def test_damaged_weights_and_pickles_are_refused(tiny_wan_folder, tmp_path):
    shutil.copytree(tiny_wan_folder / "transformer", tmp_path / "transformer")
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorruptDataError, match="can't be loaded"):
        UniViGUTransformer3DModel.from_wan(tmp_path)
    file.unlink()
    torch.save({}, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(CorruptDataError, match="can't be loaded"):
        UniViGUTransformer3DModel.from_wan(tmp_path)


def test_a_saved_model_loads_unchanged(model, inputs, tmp_path):
    video, condition, text, guess = inputs
    model.save_pretrained(tmp_path)
    assert [f.suffix for f in tmp_path.iterdir() if f.name != "config.json"] == [".safetensors"]
    loaded = UniViGUTransformer3DModel.from_pretrained(tmp_path)
    for name, value in TEXT.items():
        assert loaded.config[name] == value
    assert loaded.config.row_norm == model.config.row_norm
    ours, theirs = (m(video, TAU, condition, text, TEXT_TAU, guess) for m in (model, loaded))
    torch.testing.assert_close(ours.video, theirs.video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.text, theirs.text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["joint", "prefix"])
def test_recomputing_activations_changes_no_gradient(base, inputs, attention):
    video, condition, text, guess = inputs
    gradients = []
    for recompute in (False, True):
        model = build(base).train()
        if recompute:
            model.enable_gradient_checkpointing()
        with torch.enable_grad():
            out = model(video, TAU, condition, text, TEXT_TAU, guess, attention)
            cached = model.denoise_text(text, TEXT_TAU, model.prefill_video(video, TAU, condition), guess)
            (out.video.square().sum() + out.text.square().sum() + cached.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert {name for name, gradient in gradients[0].items() if gradient is None} == {"text_space.weight"}
    for name, gradient in gradients[0].items():
        rounding = 1e-6 if gradient is None else 1e-6 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, atol=rounding, rtol=1.3e-6, msg=name)


def test_rotary_tables_stay_exact_when_the_model_is_cast(base):
    model = build(base)
    exact = model.rope.freqs_cos.clone()
    model.to(torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert torch.equal(model.rope.freqs_cos, exact)


def test_half_precision_is_close_to_full(base, inputs):
    video, condition, text, guess = inputs
    exact = build(base)(video, TAU, condition, text, TEXT_TAU, guess)
    rough = build(base).to(torch.bfloat16)(video, TAU, condition, text, TEXT_TAU, guess)
    assert (rough.video.float() - exact.video).abs().mean() < 0.03 * exact.video.abs().mean()
    assert (rough.text - exact.text).abs().mean() < 0.03 * exact.text.abs().mean()


def test_a_cached_caption_equals_the_uncached_one(model, inputs):
    video, condition, text, _ = inputs
    table, clean = model.text_space(), torch.ones(2)
    cache = model.prefill_video(video, clean, condition)

    def integrate(hidden_of):
        guess = None

        def field(states, taus):
            nonlocal guess
            (z,), tau = states, taus[0].expand(2)
            prediction = model.read_text(hidden_of(z, tau, guess), z, tau, table)
            guess = prediction.data
            return (prediction.velocity,)

        return flow.integrate(field, [text], [flow.tau_grid(8)])[0]

    once = integrate(lambda z, tau, guess: model.denoise_text(z, tau, cache, guess))
    always = integrate(lambda z, tau, guess: model(video, clean, condition, z, tau, guess, "prefix").text)
    torch.testing.assert_close(once, always, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_at_full_size_a_cached_caption_costs_thirty_times_less():
    """81 frames of 480x832 on the 1.3B: 32,760 video tokens, 256 text tokens, 512 condition tokens, 50 steps."""
    with torch.device("meta"):
        model = UniViGUTransformer3DModel(**wan.WAN_1_3B)
        video, condition = torch.empty(1, 16, 21, 60, 104), torch.empty(1, 512, 4096)
        text, tau = torch.empty(1, 256, 64), torch.empty(1)

    def count(call):
        with FlopCounterMode(display=False) as counter:
            result = call()
        return counter.get_total_flops(), result

    whole, out = count(lambda: model(video, tau, condition, text, tau, text, "prefix"))
    assert out.text.shape == (1, 256, 64)
    once, cache = count(lambda: model.prefill_video(video, tau, condition))
    assert cache.blocks[0][0].shape[1] == 32760
    step, _ = count(lambda: model.denoise_text(text, tau, cache, text))
    assert 50 * whole / (once + 50 * step) >= 30
    assert 50 * whole == pytest.approx(14.34e15, rel=0.01)


@pytest.mark.parametrize("attention", ["joint", "prefix"])
def test_the_estimated_flops_equal_the_counted_ones(attention):
    with torch.device("meta"):
        model = UniViGUTransformer3DModel(**(wan.WAN_1_3B | {"num_layers": 1}))
        video, condition = torch.empty(1, 16, 21, 60, 104), torch.empty(1, 512, 4096)
        text, tau = torch.empty(1, 256, 64), torch.empty(1)
    with FlopCounterMode(display=False) as counter:
        model(video, tau, condition, text, tau, text, attention)
    assert model.estimate_flops(32760, 256, 512, attention) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("wrong", [{"prediction": "noise"}, {"ffn_init": "zero"}, {"caption_attention": "none"}])
def test_unknown_choices_are_refused(base, wrong):
    with pytest.raises(ConfigError, match="use "):
        UniViGUTransformer3DModel.from_wan(base, **(TEXT | wrong))


def test_an_unknown_attention_is_refused(model, inputs):
    with pytest.raises(ConfigError, match="joint, prefix"):
        model(inputs[0], TAU, inputs[1], attention="causal")


def test_an_output_table_changes_the_words_and_nothing_else_and_every_pass_reaches_it(base, model, inputs):
    video, condition, text, guess = inputs
    wide = build(base, text_output_dim=20)
    torch.nn.init.normal_(wide.text_head.proj_output.weight)
    out = wide(video, TAU, condition, text, TEXT_TAU, guess)
    assert out.text.shape == (2, 12, 16 + 20)
    table = wide.text_space()
    read = wide.read_text(out.text, text, TEXT_TAU, table)
    plain = model.read_text(out.text[..., :16], text, TEXT_TAU, table)
    more = out.text[..., 16:] @ wide.text_output.weight.T + wide.text_output.bias
    torch.testing.assert_close(read.logits[..., :58], (plain.logits + more)[..., :58])
    assert (read.logits[..., 58:] == -torch.inf).all()
    torch.testing.assert_close(read.data, read.logits.softmax(-1) @ table)
    with torch.enable_grad():  # without a loss of text
        beside = wide(video, TAU, condition, text, TEXT_TAU, guess)
        (beside.video.square().sum() + 0 * beside.text.sum()).backward()
    assert all(parameter.grad is not None for parameter in wide.text_output.parameters())
    assert all(not parameter.grad.any() for parameter in wide.text_output.parameters())


def test_an_output_table_needs_logits(base):
    with pytest.raises(ConfigError, match="has no logits"):
        build(base, text_output_dim=20, prediction="velocity")
