"""Losses on held-out samples, at fixed noise and fixed times, so that two evaluations can be compared."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from univigu import flow, text_space
from univigu.errors import ConfigError
from univigu.objective import TrainingObjective, cross_entropy, token_accuracy
from univigu.tasks import Batch
from univigu.training.data import LatentDataset
from univigu.training.engine import data_rank
from univigu.transformer import UniViGUTransformer3DModel, VideoCache

SMALL_VIDEO = 256  # tokens


@torch.no_grad()
def evaluate_heldout(
    model: UniViGUTransformer3DModel, batches: Iterable[Batch], seed: int = 0, bins: int = 10
) -> dict[str, float | int | list[float]]:
    """Losses on held-out batches at fixed noise and at the centres of ``bins`` bins of tau, and the video gain.

    Text: the understand task (empty condition, clean video), and the same without the video, at tau_v = 0. Video: the
    generate task (condition and embedded prompt given). Lists have one mean per bin: ``tau``, ``video_mse``,
    ``text_mse``, ``text_ce`` (categorical only), ``token_accuracy``, ``token_accuracy_without_video``. ``video_gain``
    is the mean difference of the two accuracies over the bins, ``samples`` the number of samples. Raises ConfigError
    where there is no sample.
    """
    table = model.text_space()
    taus = [(i + 0.5) / bins for i in range(bins)]
    sums: dict[str, list[float]] = {}
    count = 0

    def add(name: str, i: int, values: Tensor) -> None:
        sums.setdefault(name, [0.0] * bins)[i] += float(values.double().sum())

    for batch in batches:
        latents, ids = batch["latents"].float(), batch["target_ids"]
        keys = [(seed, "held out", sample) for sample in batch["sample_ids"].tolist()]
        video_noise = flow.keyed_noise([(*key, "video") for key in keys], latents.shape[1:], latents.device)
        text_data, prompt = (text_space.embed(batch[name], table) for name in ("target_ids", "prompt_ids"))
        text_noise = flow.keyed_noise([(*key, "text") for key in keys], text_data.shape[1:], latents.device)
        ones, empty = latents.new_ones(len(latents)), batch["empty_embeds"][None]
        count += len(latents)
        for shown, suffix in ((latents, ""), (video_noise, "_without_video")):
            # one cache at a time: of a clip at Wan's size, the 14B's takes 25 GiB
            cache = model.prefill_video(shown, ones if not suffix else 0 * ones, empty)
            times = [value * ones for value in taus]
            states = [flow.interpolate(text_noise, text_data, tau) for tau in times]
            # the logits, of which there may be many, for one time after the other
            for i, hidden in enumerate(_denoise_texts(model, states, times, cache)):
                prediction = model.read_text(hidden, states[i], times[i], table)
                add("token_accuracy" + suffix, i, token_accuracy(prediction, ids, table, model))
                if suffix:
                    continue
                errors = prediction.velocity - flow.velocity(text_noise, text_data)
                add("text_mse", i, errors.square().flatten(1).mean(1))
                if prediction.logits is not None:
                    ce = cross_entropy(prediction.logits, ids)
                    add("text_ce", i, ce.mean(1))
            del cache
        for i, value in enumerate(taus):
            tau = value * ones
            z = flow.interpolate(video_noise, latents, tau)
            video = model(z, tau, batch["prompt_embeds"], prompt, ones).video.float()
            add("video_mse", i, (video - flow.velocity(video_noise, latents)).square().flatten(1).mean(1))
    if not count:
        raise ConfigError("There are no held-out samples to evaluate on: hold some samples back from training.")
    means = {name: [value / count for value in values] for name, values in sums.items()}
    gains = zip(means["token_accuracy"], means["token_accuracy_without_video"], strict=True)
    return {"tau": taus, **means, "video_gain": sum(a - b for a, b in gains) / bins, "samples": count}


def _denoise_texts(
    model: UniViGUTransformer3DModel, states: Sequence[Tensor], taus: Sequence[Tensor], cache: VideoCache
) -> Iterator[Tensor]:
    """The model's output for a text at several times beside the same videos.

    Beside small videos all times are one batch: a short text alone doesn't fill a device. Large ones would be copied
    for each time. The size alone decides, so that under ZeRO 3 all processes make the same calls.
    """
    if math.prod(cache.grid) <= SMALL_VIDEO:
        yield from model.denoise_text(torch.cat(list(states)), torch.cat(list(taus)), cache).chunk(len(taus))
        return
    for z, tau in zip(states, taus, strict=True):
        yield model.denoise_text(z, tau, cache)


def heldout_scores(
    objective: TrainingObjective, heldout: LatentDataset, batch_size: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """`evaluate_heldout` on all of `heldout`, divided among the processes; every process gets the whole result."""
    buckets: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(heldout.samples):
        buckets.setdefault(sample.bucket, []).append(index)
    scores = []
    for _, indices in sorted(buckets.items()):
        gathered = _bucket_scores(objective, heldout, indices, batch_size, seed, device)
        scores.append(_weighted_mean(gathered) | {"samples": len(indices)})
    return _weighted_mean(scores)


def _bucket_scores(
    objective: TrainingObjective,
    heldout: LatentDataset,
    indices: Sequence[int],
    batch_size: int,
    seed: int,
    device: torch.device,
) -> list[Any]:
    """Each process's scores on its part of the samples of one size; fewer samples than processes are scored by all."""
    sequence = objective.transformer.sequence
    rank, world_size = data_rank(sequence.size if sequence else 1)
    mine = torch.tensor(indices)
    if len(indices) >= world_size:
        mine = mine[rank::world_size]
    # every process runs the same number of batches: under ZeRO 3 each forward pass gathers weights from all of them
    count = max(1, math.ceil(math.ceil(len(indices) / world_size) / batch_size))
    parts = [part.tolist() for part in mine.tensor_split(count) if len(part)]

    def evaluate(parts: Sequence[Sequence[int]]) -> dict[str, Any]:
        batches = (heldout.batch(part, [0] * len(part)) for part in parts)
        moved = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
        return evaluate_heldout(objective.transformer, moved, seed)

    scores = evaluate(parts)
    if count > len(parts):
        evaluate([indices[:1]] * (count - len(parts)))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, scores)
    return gathered


def _weighted_mean(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several scores of `evaluate_heldout`, weighted by their ``samples``."""
    total = sum(part["samples"] for part in scores)
    share = [part["samples"] / total for part in scores]

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], list):
            return [mean(entries) for entries in zip(*values, strict=True)]
        return sum(value * weight for value, weight in zip(values, share, strict=True))

    names = [name for name in scores[0] if name not in ("tau", "samples")]
    means = {name: mean([part[name] for part in scores]) for name in names}
    return {"tau": scores[0]["tau"], **means, "samples": total}
