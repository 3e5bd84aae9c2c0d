import pytest
import torch


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, tiny_wan_folder):
    """A random CLIP of a few thousand weights, with the tests' own tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("scorers") / "clip"
    tokenizer = AutoTokenizer.from_pretrained(tiny_wan_folder / "tokenizer", model_max_length=16)
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**part, **ids, "max_position_embeddings": 16, "bos_token_id": 0},
            vision_config={**part, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder
