"""A vision-language model in this process: a tiny LLaVA with random weights, in transformers' own layout."""

from functools import partial

import numpy as np
import pytest
import torch

from components.captions.caption_videos import Conversations, find_fault
from components.captions.captioners import CaptionRequest, load_captioner
from univigu.errors import BadInputError, ConfigError, MissingInputError

CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = "the a red blue digit moves left right slowly on black video frames what is seen describe assistant user system"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """The folder of a random LLaVA: 32-pixel pictures of 4 patches, a vocabulary of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("vlm") / "model"
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **names)
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**shape, image_size=32, patch_size=16, projection_dim=32),
                text_config=LlamaConfig(
                    **shape, vocab_size=len(vocabulary), max_position_embeddings=2048, initializer_range=0.4
                ),
                image_token_index=vocabulary["<image>"],
                vision_feature_layer=-1,
            )
        )
    model.generation_config.update(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    model.save_pretrained(folder)
    return folder


def clip(number):
    return np.random.default_rng(number).integers(0, 256, (9, 40, 48, 3), np.uint8), 8.0


def broken():
    raise BadInputError("The clip can't be read; make it again.")


@pytest.fixture
def caption(vlm):
    """Have `count` noise clips captioned; returns their outcomes, and the captioner."""

    def run(count=3, batch_size=2, attempts=1, bounds=(1, 4000), openers=None, **options):
        known = {"folder": vlm.name, "frames": 2, "max_side": 32, "generation": {"max_new_tokens": 12}}
        config = {"root": vlm.parent, "seed": 0, "batch_size": batch_size, "options": {**known, **options}}
        captioner = load_captioner("transformers", config)
        conversations = Conversations(
            lambda r, text: find_fault(r, text, len(text), captioner.instructions, ()), attempts
        )
        openers = openers or [partial(clip, number) for number in range(count)]
        requests = [CaptionRequest(f"c{i}", "0", opener, "a red digit", bounds) for i, opener in enumerate(openers)]
        captioner.caption(requests, conversations.follow_up)
        return conversations.outcomes, captioner

    return run


def test_captions_are_deterministic_and_depend_on_the_frames(caption):
    first, captioner = caption(4)
    assert first == caption(4)[0]
    assert all(one.text for one in first.values())
    assert len({one.text for one in first.values()}) > 1
    assert all(one.usage["completion_tokens"] <= 12 < one.usage["prompt_tokens"] for one in first.values())
    assert captioner.template_version == "video-caption-1"


def test_a_batch_asks_again_only_about_bad_captions(caption):
    outcomes, _ = caption(4, attempts=2, bounds=(1000, 4000))
    assert {one.attempts for one in outcomes.values()} == {2}
    assert {one.reason for one in outcomes.values()} <= {"too_short", "truncated"}


def test_a_text_of_maximal_length_is_truncated(caption):
    outcomes, captioner = caption(6, batch_size=6)
    for one in outcomes.values():
        assert (one.status == "truncated") == (one.usage["completion_tokens"] == 12), one
    assert "truncated" in {one.status for one in outcomes.values()}
    end = captioner.model.generation_config.eos_token_id
    assert captioner._respond(torch.tensor([8, 9, end, 0, 0]), 5).usage == {"prompt_tokens": 5, "completion_tokens": 3}


def test_reasoning_is_not_part_of_a_caption(caption):
    _, captioner = caption(1)
    words, end = captioner.processor.tokenizer, captioner.model.generation_config.eos_token_id
    words.add_tokens(["<think>", "</think>"])
    thought, said = (words.convert_tokens_to_ids(text.split()) for text in ("<think> what </think>", "red digit moves"))
    assert captioner._respond(torch.tensor([*thought, *said, end]), 5).text == "red digit moves"
    response = captioner._respond(torch.tensor([*thought[:2], *said, end]), 5)
    assert (response.status, response.reason) == ("success", "wrapping")


def test_a_damaged_clip_does_not_affect_its_batch(caption):
    outcomes, _ = caption(openers=[broken, partial(clip, 1)], batch_size=2)
    assert (outcomes["c0"].reason, outcomes["c0"].attempts) == ("damaged", 0)
    assert outcomes["c1"].text == caption(openers=[broken, partial(clip, 1)], batch_size=1)[0]["c1"].text


def test_other_weights_change_the_digest(caption, vlm, tmp_path):
    import shutil

    _, captioner = caption(0)
    shutil.copytree(vlm, tmp_path / "model")
    same = load_captioner("transformers", {"root": tmp_path, "batch_size": 1, "options": captioner.options.__dict__})
    assert same.digest == captioner.digest
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    other = load_captioner("transformers", {"root": tmp_path, "batch_size": 1, "options": captioner.options.__dict__})
    assert other.digest != captioner.digest


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"folder": "nowhere"}, MissingInputError, "no model in .*nowhere"),
        ({"folder": "../../etc"}, BadInputError, "leaves the work root"),
        ({"precision": "int8"}, ConfigError, "precision of auto, bf16"),
        ({"generation": {"do_sample": True}}, ConfigError, "decodes greedily"),
    ],
)
def test_invalid_options_are_rejected_before_a_model_is_loaded(caption, options, error, message):
    with pytest.raises(error, match=message):
        caption(1, **options)


def test_a_text_only_model_is_rejected(caption, vlm, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(vlm).save_pretrained(vlm.parent / "words")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=30)).save_pretrained(vlm.parent / "words")
    with pytest.raises(BadInputError, match=r"doesn't read pictures|can't load a vision-language model"):
        caption(1, folder="words")
