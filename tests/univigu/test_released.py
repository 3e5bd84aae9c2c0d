"""The authors' released layout: its forward pass written anew from its names, its path, and what is refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from univigu import ObjectiveConfig, TrainingObjective, UniViGUPipeline, discrete, wan
from univigu.errors import BadInputError, ConfigError, CorruptDataError, MissingInputError

HEADS, HEAD_DIM, WIDTH = 2, 12, 24


@pytest.fixture(scope="module")
def release(tiny_wan_folder):
    """A random state dict under the release's names, for the tiny Wan and its tokenizer."""
    transformer = WanTransformer3DModel.from_pretrained(tiny_wan_folder / "transformer")
    base = {key: value.clone() for key, value in transformer.state_dict().items()}
    vocabulary = wan.token_rows(tiny_wan_folder).shape[0]
    state = {}
    for key, value in base.items():
        part, *rest = key.split(".", 1)
        if part == "condition_embedder":
            inner = rest[0]
            if inner.startswith("text_embedder."):
                state[inner.replace("text_embedder", "cond_text_embedder")] = value
            else:
                state[f"time_embedding_v.{inner}"] = value
                state[f"time_embedding_t.{inner}"] = value + 0.1 * torch.randn_like(value)
        elif key == "scale_shift_table":
            state["scale_shift_table_v"], state["scale_shift_table_t"] = value, value + 0.3
        elif part == "proj_out":
            state[f"video_head.{key}"] = value
        else:
            state[key] = value
            if ".ffn." in key:
                state[key.replace(".ffn.", ".ffn_t.")] = value + 0.1 * torch.randn_like(value)
    state["vocab_embed.weight"] = torch.randn(vocabulary, WIDTH)
    state["text_head.norm_final.weight"] = 1 + 0.1 * torch.randn(WIDTH)
    state["text_head.linear.weight"] = torch.randn(vocabulary, WIDTH)
    state["text_head.linear.bias"] = torch.randn(vocabulary)
    state["rotary_emb_text.inv_freq"] = 10_000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return state


@pytest.fixture(scope="module")
def file(release, tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "released.safetensors"
    save_file({f"_fsdp_wrapped_module.{key}": value.contiguous() for key, value in release.items()}, path)
    return path


@pytest.fixture(scope="module")
def pipeline(file, tiny_wan_folder):
    size = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16, "text_length": 10}
    pipeline = UniViGUPipeline.from_release(file, tiny_wan_folder, **size, caption_steps=4)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def times(state, name, t):
    """The time embedding and the modulation of Wan's timestep t (B,)."""
    angles = t[:, None] * 10_000.0 ** -(torch.arange(16) / 16)
    hidden = linear(state, f"{name}.time_embedder.linear_1", torch.cat([angles.cos(), angles.sin()], 1))
    temb = linear(state, f"{name}.time_embedder.linear_2", F.silu(hidden))
    return temb, linear(state, f"{name}.time_proj", F.silu(temb)).unflatten(1, (6, -1))


def rms(state, name, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]


def attention(state, name, x, context, turn):
    """Attention over heads; ``turn`` applies the rotary positions to (B, S, heads, head_dim)."""
    q, k = (rms(state, f"{name}.norm_{n}", linear(state, f"{name}.to_{n}", y)) for n, y in (("q", x), ("k", context)))
    q, k, v = (y.unflatten(2, (HEADS, -1)) for y in (q, k, linear(state, f"{name}.to_v", context)))
    scores = torch.einsum("bqhd,bkhd->bhqk", turn(q), turn(k)) / math.sqrt(HEAD_DIM)
    return linear(state, f"{name}.to_out.0", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


def ffn(state, name, x):
    return linear(state, f"{name}.net.2", F.gelu(linear(state, f"{name}.net.0.proj", x), approximate="tanh"))


def turned(video, grid):
    """Wan's rotary positions for the patches, and positions 0, 1, ... over all channels, in halves, for the text."""
    count = math.prod(grid)
    sizes = [HEAD_DIM - 4 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6)]
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(count, 3)
    angles = [
        places[:, i, None] * 10_000.0 ** -(torch.arange(0, size, 2).double() / size) for i, size in enumerate(sizes)
    ]
    angle = torch.cat(angles, 1).float()[None, :, None]
    pair = video[:, :count].unflatten(-1, (-1, 2))
    one, two = pair[..., 0], pair[..., 1]
    first = torch.stack([one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], -1).flatten(-2)
    text = video[:, count:]
    frequencies = 10_000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = (torch.arange(text.shape[1])[:, None] * frequencies)[None, :, None]
    one, two = text.chunk(2, -1)
    second = torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)
    return torch.cat([first, second], 1)


def forward(state, video, ids, t_video, t_text, condition):
    """The release's velocity of the video and logits of the text, from its state dict."""
    patches = F.conv3d(video, state["patch_embedding.weight"], state["patch_embedding.bias"], stride=(1, 2, 2))
    grid, count = patches.shape[2:], math.prod(patches.shape[2:])
    x = torch.cat([patches.flatten(2).transpose(1, 2), state["vocab_embed.weight"][ids]], 1)
    hidden = F.gelu(linear(state, "cond_text_embedder.linear_1", condition), approximate="tanh")
    context = linear(state, "cond_text_embedder.linear_2", hidden)
    (temb_v, six_v), (temb_t, six_t) = (
        times(state, "time_embedding_v", t_video),
        times(state, "time_embedding_t", t_text),
    )

    def each(values_v, values_t):
        """A modulation for each token: (B, S, width)."""
        return torch.cat([values_v.expand(-1, count, -1), values_t.expand(-1, ids.shape[1], -1)], 1)

    for i in range(2):
        block = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items()}
        table = block["scale_shift_table"]
        parts = [each(v, t) for v, t in zip((table + six_v).chunk(6, 1), (table + six_t).chunk(6, 1), strict=True)]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        y = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift
        x = x + attention(block, "attn1", y, y, lambda z: turned(z, grid)) * gate
        y = F.layer_norm(x, (WIDTH,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        x = x + attention(block, "attn2", y, context, lambda z: z)
        y = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + ffn_scale) + ffn_shift
        x = x + torch.cat([ffn(block, "ffn", y[:, :count]), ffn(block, "ffn_t", y[:, count:])], 1) * ffn_gate
    shift, scale = (state["scale_shift_table_v"] + temb_v[:, None]).chunk(2, 1)
    out = linear(state, "video_head.proj_out", F.layer_norm(x[:, :count], (WIDTH,), eps=1e-6) * (1 + scale) + shift)
    out = out.view(len(video), *grid, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5)
    shift, scale = (state["scale_shift_table_t"] + temb_t[:, None]).chunk(2, 1)
    text = F.layer_norm(x[:, count:], (WIDTH,), eps=1e-5) * state["text_head.norm_final.weight"] * (1 + scale) + shift
    return out.flatten(2, 3), linear(state, "text_head.linear", text)


@pytest.mark.parametrize("tau", [(0.25, 0.5), (1.0, 0.1)])
@torch.no_grad()
def test_the_model_computes_what_the_release_does(release, pipeline, tau):
    generator = torch.Generator().manual_seed(0)
    video, condition = torch.randn(2, 4, 3, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    ids = torch.randint(len(pipeline.tokenizer), (2, 10), generator=generator)
    video_tau, text_tau = (torch.full((2,), one) for one in tau)
    theirs = forward(release, video, ids, 1000 * (1 - video_tau), 1000 * (1 - text_tau), condition)
    ours = pipeline.transformer(video, video_tau, condition, ids, text_tau)
    torch.testing.assert_close(-ours.video, theirs[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.text, theirs[1], atol=2e-4, rtol=1e-4)
    seen = pipeline.transformer.prefill_video(video, video_tau, condition)
    torch.testing.assert_close(pipeline.transformer.denoise_text(ids, text_tau, seen), ours.text, atol=1e-5, rtol=1e-5)


def test_clips_are_captioned_from_their_own_seeds_on_latents_as_the_autoencoder_makes_them(pipeline, tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (2, 9, 32, 32, 3), dtype=np.uint8)
    assert pipeline.vae.config.latents_std == [1.0] * 4
    first, second = pipeline.caption(clips, batch_size=2)
    assert pipeline.caption(clips[1]) == [second]
    assert pipeline.caption(clips[1], seed=5) != [second]
    assert pipeline.caption(clips[1], temperature=0.0, seed=5) == pipeline.caption(clips[1], temperature=0.0, seed=5)
    assert pipeline.caption(clips[1], guidance_scale=3.0) != [second]
    pipeline.save_pretrained(tmp_path)
    loaded = UniViGUPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.caption(clips) == [first, second]


def test_a_cached_video_costs_less_and_reads_otherwise(file, tiny_wan_folder, pipeline):
    """In the release a video attends to the text; with `prefix` it doesn't, so it is read once."""
    size = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16, "text_length": 10}
    cached = UniViGUPipeline.from_release(file, tiny_wan_folder, **size, caption_attention="prefix")
    video, tau, condition = torch.randn(1, 4, 3, 8, 8), torch.ones(1), torch.zeros(1, 16, 32)
    ids, text_tau = torch.zeros(1, 10, dtype=torch.long), torch.tensor([0.5])
    with torch.no_grad():
        found = [
            model(video, tau, condition, ids, text_tau, attention="text_only").text
            for model in (cached.transformer, pipeline.transformer)
        ]
    assert (found[0] - found[1]).abs().max() > 1e-3
    reading, writing = cached.transformer.estimate_caption_flops(1000, 10, 16)
    assert pipeline.transformer.estimate_caption_flops(1000, 10, 16)[1] > reading > writing


def test_a_text_beside_a_video_and_training_are_refused_in_one_sentence(pipeline):
    for call in (lambda: pipeline.joint("a red five"), lambda: pipeline("a red five", text_stream=True)):
        with pytest.raises(BadInputError, match="texts are token ids") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no training loop here"):
        TrainingObjective(pipeline.transformer, ObjectiveConfig())
    assert pipeline("a red five", seed=0, num_inference_steps=1).frames.shape == (1, 9, 32, 32, 3)


def test_other_files_are_refused_in_one_sentence(file, release, tiny_wan_folder, tmp_path):
    other = tmp_path / "other.safetensors"
    cases = {
        MissingInputError: (tmp_path / "none.safetensors", "no weights at"),
        CorruptDataError: (other, "can't be read"),
    }
    other.write_bytes(file.read_bytes()[:100])
    for error, (given, message) in cases.items():
        with pytest.raises(error, match=message):
            UniViGUPipeline.from_release(given, tiny_wan_folder)
    pickle = tmp_path / "step.pth"
    pickle.write_bytes(b"")
    with pytest.raises(BadInputError, match="pickles are not read"):
        UniViGUPipeline.from_release(pickle, tiny_wan_folder)
    save_file({"proj_out.bias": torch.zeros(1)}, other)
    with pytest.raises(BadInputError, match="isn't the released model"):
        UniViGUPipeline.from_release(other, tiny_wan_folder)
    save_file({key: value.contiguous() for key, value in release.items() if ".ffn_t." not in key}, other)
    with pytest.raises(BadInputError, match=r"8 weights missing, 0 unknown, 0 of another shape; one is blocks\.0\.ffn"):
        UniViGUPipeline.from_release(other, tiny_wan_folder)


# --- the path ---------------------------------------------------------------------------------------------------------


def test_a_sampler_that_knows_the_text_follows_the_mixture_path():
    """At tau a token is the text's own with probability tau, and the source's otherwise; at 1 it is the text's own."""
    length, vocabulary = 4000, 50
    seeds = [0, 1]
    target = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(5))
    logits = F.one_hot(target, vocabulary) * 100.0
    steps = discrete.JumpSteps(20, seeds)
    z = source = discrete.random_ids(seeds, "text", length, vocabulary, torch.device("cpu"))
    for i in range(len(steps)):
        z = steps.step(i, z, logits)
        if i == 9:
            assert (z == target).float().mean() == pytest.approx(0.5, abs=0.03)
            mixed = discrete.mix(source, target, torch.full((2,), 0.5), torch.rand(2, length))
            assert (mixed == target).float().mean() == pytest.approx(0.51, abs=0.03)
    assert torch.equal(z, target)


def test_tokens_are_drawn_with_their_probabilities():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = discrete.draw(probabilities.log().expand(1, 1000, 4), uniform[None])
    assert drawn[0].bincount(minlength=4).tolist() == [100, 0, 600, 300]
    assert discrete.draw(torch.zeros(1, 1, 4), torch.ones(1, 1)).item() == 3


def test_the_loss_is_the_cross_entropy_of_the_texts_own_tokens():
    logits, ids = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    expected = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(discrete.cross_entropy(logits, ids), expected)
