"""Rehearsals: the bundled profiles pass, and what would fail on a GPU fails here, with its sentence."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.pipeline.profiles import load_profile
from components.planning.meta_models import build_models
from components.planning.rehearsal import Scene, environment, exit_code, model_checks, rehearse, training
from components.planning.rehearsal.lines import ToDo
from univigu import wan
from univigu.errors import BadInputError, ConfigError, MissingInputError

ROOT = Path(__file__).parents[3]


def scene(name, root=ROOT, weights=None, gpus=16, gpu="h800", **sections):
    return Scene(name, {**load_profile(name), **sections}, root, weights, gpus, gpu)


def tiny(tiny_wan_folder):
    """The tiny profile for the tests' own base, as a scene, and its models."""
    profile = load_profile("tiny")
    return profile, build_models(profile, tiny_wan_folder)


@pytest.mark.slow
def test_the_14b_is_rehearsed_at_full_size_in_little_time_and_4_gib():
    code = (
        "import resource, sys, time; import torch, diffusers, transformers; loaded = time.process_time()\n"
        "from components.cli.main import main\n"
        "sys.argv = ['univigu', 'rehearse', '--profile', 'wan-14b', '--json']\n"
        "try: main()\n"
        "finally:\n"
        "    times = time.process_time() / loaded\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, times, file=sys.stderr)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CAPTION_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert [check for check in said["checks"] if check["state"] == "failed"] == []
    assert done.returncode == 0
    subjects = {check["subject"]: check for check in said["checks"]}
    for task in ("understand", "joint", "generate"):
        assert "33,016 tokens" in subjects[f"training step, {task}"]["detail"]
    assert subjects["weights"]["state"] == "to do"
    kilobytes, times_the_imports = map(float, done.stderr.split()[-2:])
    assert kilobytes < 4 * 2**20
    assert times_the_imports < 20  # about a minute on two cores


@pytest.mark.slow
def test_the_bundled_base_passes_weights_and_all():
    lines = rehearse(scene("tiny", gpus=1))
    assert {line.subject: line.detail for line in lines if line.state != "ok"} == {}
    assert exit_code(lines) == 0


@pytest.mark.slow
def test_a_profile_that_can_not_fit_the_gpu_fails_with_what_it_needs():
    profile = load_profile("wan-14b")
    models = build_models(profile, wan.config_folder(profile["base"]))
    needs = r"Stage 1 needs [\d.]+ GiB on each of 16 rtx4090, which have 21\.\d usable"
    with pytest.raises(ConfigError, match=needs):
        training.check_memory(scene("wan-14b", gpu="rtx4090"), models, 1)


def test_a_base_that_makes_videos_from_images_alone_is_refused(tmp_path):
    config = {"_class_name": "WanTransformer3DModel", "in_channels": 36, "out_channels": 16, "image_dim": 1280}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="makes videos from an image"):
        build_models(load_profile("wan-14b"), tmp_path)


def test_a_generator_that_needs_an_image_is_refused_and_others_are_named():
    profile = load_profile("wan-14b")
    assert environment.check_generator(profile, ROOT) == "Wan2.1-T2V-14B-Diffusers, WanPipeline"
    with pytest.raises(ToDo, match=r"put the generator at .*/elsewhere"):
        environment.check_generator({**profile, "generator": "model/elsewhere"}, ROOT)
    with pytest.raises(BadInputError, match="is WanImageToVideoPipeline, which needs an image for each clip") as caught:
        environment.check_generator({**profile, "generator": "model/Wan2.1-I2V-14B-720P-Diffusers"}, ROOT)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_parts_of_wan_2_2_fit_together_at_the_size_of_its_profile():
    profile = load_profile("wan-5b")
    models = build_models(profile, wan.config_folder(profile["base"]))
    assert model_checks.check_shapes(profile, models) == "latents 48x31x44x80, 27,280 video tokens"
    assert model_checks.check_keys(models).startswith("825 of Wan's")
    assert model_checks.check_text_encoder(profile, models) == "states 512x4096"


def test_weights_of_another_size_of_wan_are_refused(tiny_wan_folder):
    profile = load_profile("wan-1.3b")
    large = build_models(profile, wan.config_folder("model/Wan2.1-T2V-14B-Diffusers"))
    with pytest.raises(BadInputError, match="The weights of the transformer don't match its config"):
        model_checks.check_files(profile, scene("wan-1.3b", weights=tiny_wan_folder), [large])


@pytest.mark.slow
def test_another_architecture_fails_by_name_and_the_rest_is_still_rehearsed(tiny_wan_folder, tmp_path):
    folder = shutil.copytree(tiny_wan_folder, tmp_path / "base")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "_class_name": "HunyuanVideoTransformer"}))
    lines = rehearse(scene("tiny", weights=folder, gpus=1))
    failed = [line for line in lines if line.state == "failed"]
    assert [line.subject for line in failed] == ["modules", "weights"]
    assert "is HunyuanVideoTransformer, not WanTransformer3DModel" in failed[0].detail
    assert exit_code(lines) == BadInputError.exit_code
    assert lines[-1].subject == "TrainJobs"


def test_another_autoencoder_than_the_transformers_is_refused(tiny_wan_folder, tmp_path):
    folder = shutil.copytree(tiny_wan_folder, tmp_path / "base")
    config = json.loads((folder / "vae/config.json").read_text())
    wider = {**config, "z_dim": 48, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    (folder / "vae/config.json").write_text(json.dumps(wider))
    profile = load_profile("tiny")
    with pytest.raises(BadInputError, match=r"latents have 48 channels .* but the transformer takes 4"):
        model_checks.check_shapes(profile, build_models(profile, folder))
    (folder / "vae/config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKLHunyuanVideo"}))
    with pytest.raises(BadInputError, match="is AutoencoderKLHunyuanVideo, not AutoencoderKLWan"):
        build_models(profile, folder)


@pytest.mark.parametrize("video", [{"frames": 10}, {"height": 36}, {"width": 30}])
def test_a_clip_that_patches_do_not_divide_is_refused(tiny_wan_folder, video):
    profile, models = tiny(tiny_wan_folder)
    changed = {**profile, "video": {**profile["video"], **video}}
    with pytest.raises(ConfigError, match="can't be divided into patches; choose 4k \\+ 1 frames"):
        model_checks.check_shapes(changed, models)


def test_a_caption_that_the_rotary_tables_have_no_place_for_is_refused(tiny_wan_folder):
    profile = load_profile("tiny")
    long = {**profile, "text": {**profile["text"], "caption_tokens": [32, 512]}}
    with pytest.raises(BadInputError, match="shorter text_length"):
        model_checks.check_shapes(long, build_models(long, tiny_wan_folder))


def test_captions_that_may_be_as_short_as_a_prompt_are_refused():
    profile = load_profile("tiny")
    short = {**profile, "text": {**profile["text"], "caption_tokens": [20, 40]}}
    with pytest.raises(ConfigError, match=r"caption_tokens. begins at 20; .* begin above 31"):
        environment.describe_texts(short)


def test_a_share_that_no_task_has_leaves_weights_untrained(tiny_wan_folder):
    profile, models = tiny(tiny_wan_folder)
    trained = set()
    training.check_task(profile, models, "generate", trained)
    with pytest.raises(BadInputError, match=r"No task of the profile trains blocks\.1\.ffn_text"):
        training.check_trained(models, trained)


def test_variables_that_a_captioner_reads_are_named_until_they_are_set(monkeypatch):
    profile = load_profile("tiny")
    captions = {**profile["caption_videos"], "options": {"api_key_env": "SOME_CAPTION_KEY"}}
    with pytest.raises(ToDo, match="set SOME_CAPTION_KEY where"):
        environment.check_captioner({**profile, "caption_videos": captions}, ROOT)
    monkeypatch.setenv("SOME_CAPTION_KEY", "secret-value")
    assert "secret-value" not in environment.check_captioner({**profile, "caption_videos": captions}, ROOT)
    with pytest.raises(ConfigError, match="no captioner 'nobody'"):
        environment.check_captioner({**profile, "caption_videos": {**captions, "captioner": "nobody"}}, ROOT)


def test_the_reader_of_captions_is_named_until_it_is_there(tmp_path):
    profile = load_profile("tiny")
    for mode, model in (("off", "model/clip"), ("enforce", "")):
        profile["validate_data"]["caption_quality"] = {"mode": mode, "model": model}
        environment.check_captioner(profile, tmp_path)
    profile["validate_data"]["caption_quality"] = {"mode": "score", "model": "model/clip"}
    with pytest.raises(ToDo, match=r"put the model of 'validate_data.caption_quality' into .*/model/clip"):
        environment.check_captioner(profile, tmp_path)


def test_what_the_evaluation_reads_is_named_until_it_is_there(tmp_path):
    profile = load_profile("wan-1.3b")
    with pytest.raises(ToDo, match=r"put heldout at .*evaluation-prompts\.jsonl"):
        environment.check_evaluation(profile, tmp_path)
    assert "benchmark 'pairs'" in environment.check_evaluation(profile, ROOT)
    with pytest.raises(ConfigError, match="no benchmark 'guesses'"):
        environment.check_evaluation({**profile, "evaluate_model": {"benchmark": "guesses"}}, ROOT)


def test_prompts_are_counted_until_there_are_enough(tmp_path):
    profile = load_profile("wan-1.3b")
    with pytest.raises(ToDo, match="put your prompts"):
        environment.check_prompts(profile, tmp_path)
    (tmp_path / "data/raw-prompts").mkdir(parents=True)
    (tmp_path / "data/raw-prompts/few.jsonl").write_text('{"text": "a"}\n' * 3)
    with pytest.raises(ToDo, match="there are 3 for 20,000 clips"):
        environment.check_prompts(profile, tmp_path)
    with gzip.open(tmp_path / "data/raw-prompts/more.csv.gz", "wt") as stream:
        stream.write("prompt\n" + "a cat\n" * 20_000)
    (tmp_path / "data/raw-prompts/deeper").mkdir()
    (tmp_path / "data/raw-prompts/deeper/none.jsonl").write_text('{"text": "a"}\n')  # curation reads no folders
    assert environment.check_prompts(profile, tmp_path) == "20,003 for 20,000 clips"
    (tmp_path / "data/raw-prompts/other.csv").write_text("width,height\n1,2\n")
    with pytest.raises(BadInputError, match=r"other\.csv"):
        environment.check_prompts(profile, tmp_path)


def test_gpus_that_do_not_fill_nodes_are_refused():
    with pytest.raises(ConfigError, match="12 GPUs don't fill nodes of 8"):
        environment.check_train_jobs(scene("wan-1.3b", gpus=12))
    assert environment.check_train_jobs(scene("wan-1.3b", gpus=6)) == "2, on 1 node of 6 GPUs"


@pytest.mark.parametrize("sampling", [{}, {"guidance_scale": 1.0, "caption_guidance_scale": 3.0}])
@pytest.mark.slow
def test_a_step_of_each_way_to_sample_is_taken(tiny_wan_folder, sampling):
    profile, models = tiny(tiny_wan_folder)
    profile["model"]["sampling"] |= sampling
    calls = []
    models.transformer.register_forward_hook(lambda *_: calls.append("video"))
    assert "text in" in model_checks.check_sampling(profile, models)
    # a small video's step is a call, with guidance too; a text's is two, for the video's keys and for the text, each
    # of them twice with guidance
    assert len(calls) == (1 + 2 * 2 if sampling else 1 + 2)


@pytest.mark.slow
def test_a_step_that_a_cluster_would_stop_half_way_is_named():
    profile = load_profile("wan-14b")
    models = build_models(profile, wan.config_folder(profile["base"]))
    with pytest.raises(ToDo, match=r"synthesize-videos takes [\d,]+ hours on 4 and is stopped after 336"):
        environment.check_hours(scene("wan-14b", gpus=4), models)


def test_a_batch_that_gpus_can_not_share_fails_as_it_would_in_training():
    with pytest.raises(BadInputError, match="can't be split evenly over 5"):
        training.check_deepspeed(scene("wan-1.3b", gpus=5), 1)


def test_weights_that_were_named_and_are_not_there_fail(tmp_path):
    with pytest.raises(MissingInputError, match="There is no folder"):
        model_checks.check_files(load_profile("tiny"), scene("tiny", weights=tmp_path / "nowhere"), [])
