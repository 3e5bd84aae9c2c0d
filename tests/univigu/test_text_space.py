"""The table of token embeddings: its geometry, embedding and decoding, and reading the text head's output."""

import math

import pytest
import torch

from univigu import flow, text_space
from univigu.errors import ConfigError
from univigu.text_space import TextSpace


def make_space(vocab_size=200, dim=16, row_norm=4.0):
    torch.manual_seed(0)
    return TextSpace(vocab_size, dim, row_norm)


def test_every_row_has_the_requested_norm():
    space = make_space()
    with torch.no_grad():
        space.weight.mul_(torch.rand(200, 1) * 10)
    torch.testing.assert_close(space().norm(dim=1), torch.full((200,), 4.0))


def test_row_norms_agree_with_the_two_known_vocabularies():
    assert text_space.row_norm_for(256300) == pytest.approx(8, abs=0.6)
    assert text_space.row_norm_for(58) == pytest.approx(4, abs=0.4)


def test_tokens_become_readable_around_tau_star():
    vocab_size = 4000
    table = make_space(vocab_size, 64, text_space.row_norm_for(vocab_size))()
    ids = torch.arange(500)[None]
    data = text_space.embed(ids, table)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))

    def readable(tau):
        z = flow.interpolate(noise, data, tau)
        return float((text_space.nearest(z, table, vocab_size) == ids).float().mean())

    assert readable(0.2) < 0.15
    assert 0.2 < readable(0.4) < 0.98
    assert readable(0.6) > 0.98


def test_nearest_finds_every_embedded_token():
    table = make_space()()
    ids = torch.arange(200).reshape(4, 50)
    assert torch.equal(text_space.nearest(text_space.embed(ids, table), table, 200), ids)


def test_rows_beyond_the_tokenizer_are_never_predicted():
    table = make_space()()
    ids = torch.arange(150, 200)[None]
    z = text_space.embed(ids, table)
    assert (text_space.nearest(z, table, 150) < 150).all()
    prediction = text_space.read_out(torch.zeros_like(z), z, torch.tensor([0.5]), table, 150, "categorical")
    assert (prediction.logits.softmax(-1)[..., 150:] == 0).all()


def test_an_untrained_categorical_head_gives_the_posterior_of_a_token_seen_through_noise():
    table, tau = make_space()(), torch.tensor([0.3, 0.6])
    z = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    prediction = text_space.read_out(torch.zeros_like(z), z, tau, table, 200, "categorical")
    distance = (z[:, :, None] - tau[:, None, None, None] * table).square().sum(-1)
    posterior = (-distance / (2 * (1 - tau[:, None, None]) ** 2)).softmax(-1)
    torch.testing.assert_close(prediction.logits.softmax(-1), posterior, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(prediction.data, posterior @ table, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", text_space.PREDICTIONS)
def test_data_and_velocity_of_every_prediction_agree(kind):
    table, tau = make_space()(), torch.tensor([0.1, 0.95])
    z, hidden = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(3)).unbind()
    prediction = text_space.read_out(hidden, z, tau, table, 200, kind)
    torch.testing.assert_close(
        flow.velocity_to_data(prediction.velocity, z, tau), prediction.data, atol=1e-4, rtol=1e-4
    )
    assert (prediction.logits is not None) == (kind == "categorical")


def test_temperature_0_gives_the_most_likely_token_and_1_the_mean():
    table = make_space()()
    z = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))

    def read(temperature):
        tau = torch.tensor([0.3, 0.3])
        return text_space.read_out(z, z, tau, table, 200, "categorical", temperature=temperature)

    warm, cold, frozen = read(1.0), read(1e-4), read(0.0)
    torch.testing.assert_close(warm.data, warm.logits.softmax(-1) @ table)
    torch.testing.assert_close(frozen.data, text_space.embed(warm.logits.argmax(-1), table))
    torch.testing.assert_close(cold.data, frozen.data, atol=1e-3, rtol=1e-3)
    assert torch.equal(warm.logits, frozen.logits)


def test_confidence_is_bounded():
    k = text_space.confidence(torch.tensor([0.0, 0.5, 0.9, 1.0]))
    torch.testing.assert_close(k, torch.tensor([0.0, 2.0, 20.0, 20.0]))


@pytest.mark.parametrize("width", [8, 16, 64])
def test_a_projection_of_other_rows_keeps_their_neighbours(width):
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(20, width, generator=generator)
    rows = centres.repeat_interleave(10, 0) + 0.1 * torch.randn(200, width, generator=generator)
    space, again = make_space(), make_space()
    space.init_from(rows)
    again.init_from(rows)
    assert torch.equal(space.weight, again.weight)
    table = space()
    similar = (table @ table.T).fill_diagonal_(-torch.inf)
    group = torch.arange(200) // 10
    assert (group[similar.argmax(1)] == group).float().mean() > 0.95


def test_empty_and_equal_rows_become_distinct():
    space = make_space()
    space.init_from(torch.cat([torch.zeros(100, 32), torch.ones(100, 32)]))
    table = space()
    torch.testing.assert_close(table.norm(dim=1), torch.full((200,), 4.0))
    assert torch.equal(text_space.nearest(table[None], table, 200)[0], torch.arange(200))


def test_rows_of_another_vocabulary_are_refused():
    with pytest.raises(ConfigError, match="set vocab_size"):
        make_space().init_from(torch.randn(100, 32))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ConfigError, match="categorical, x1, velocity"):
        text_space.read_out(torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), torch.zeros(1), make_space()(), 200, "noise")


def test_tokenizing_and_detokenizing_round_trips(tiny_wan_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_wan_folder / "tokenizer")
    texts = ["the digit moves left", "", "a red digit"]
    ids = text_space.tokenize(tokenizer, texts, 12)
    assert ids.shape == (3, 12)
    assert ((ids == tokenizer.eos_token_id).sum(1) == 1).all()
    assert text_space.detokenize(tokenizer, ids) == texts
    cut = text_space.tokenize(tokenizer, ["the digit moves left"], 3)
    assert cut[0, -1] == tokenizer.eos_token_id
    assert text_space.detokenize(tokenizer, cut) == ["the digit"]


def test_text_ends_at_the_first_eos(tiny_wan_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_wan_folder / "tokenizer")
    ids = text_space.tokenize(tokenizer, ["the digit"], 8)
    ids[0, 5] = ids[0, 0]
    assert text_space.detokenize(tokenizer, ids) == ["the digit"]


def test_tau_star_follows_from_the_row_norm():
    a, r = math.sqrt(2 * math.log(1000)), text_space.row_norm_for(1000, 0.3)
    assert a / (a + r) == pytest.approx(0.3)


def test_an_output_table_says_more_than_the_tokens_space_can():
    """A softmax of rank 1 can't make two of three tokens on one line likely; with a table of its own it can."""
    table = torch.tensor([[-1.0], [0.1], [1.0]])
    outer = torch.tensor([[[0.5, 0.0, 0.5]]])
    output = text_space.TextOutput(3, 2)
    more = torch.zeros(1, 1, 2, requires_grad=True)
    optimizer = torch.optim.Adam([more, *output.parameters()], lr=0.1)

    def divergence(hidden, wide):
        z, tau = torch.zeros(1, 1, 1), torch.zeros(1)
        logits = text_space.read_out(hidden, z, tau, table, 3, "categorical", more_logits=wide).logits
        return (outer * (outer.clamp_min(1e-9).log() - logits.log_softmax(-1))).sum()

    least = min(float(divergence(h, None)) for h in torch.linspace(-9, 9, 181).reshape(-1, 1, 1, 1))
    assert least > 0.3
    for _ in range(200):
        optimizer.zero_grad()
        divergence(torch.zeros(1, 1, 1), output(more)).backward()
        optimizer.step()
    assert divergence(torch.zeros(1, 1, 1), output(more)).item() < 0.01


def test_an_untrained_output_gives_the_posterior_under_the_tokens_frequencies():
    table = make_space(5, 4)()
    output = text_space.TextOutput(5, 3)
    output.init_bias(torch.tensor([6.0, 0, 2, 0, 0]))
    z, tau = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3])
    more = output(torch.zeros(1, 1, 3))
    read = text_space.read_out(torch.zeros(1, 1, 4), z, tau, table, 5, "categorical", more_logits=more)
    # p(z | k) is normal around tau E_k with deviation 1 - tau; all rows have the same norm
    likelihood = (-(z - 0.3 * table).square().sum(-1) / (2 * 0.7**2)).exp()
    prior = torch.tensor([7.0, 1, 3, 1, 1]) / 13
    posterior = likelihood * prior / (likelihood * prior).sum()
    torch.testing.assert_close(read.logits.softmax(-1)[0], posterior)
