"""The loss of training samples (eq 10, 11): their forward passes, one for each attention policy, and their errors.

What a sample and a batch are: see `univigu.tasks`.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import flow, text_space
from .errors import ConfigError
from .tasks import TASKS, Batch, ObjectiveConfig, Samples, draw_step, prepare, redraw_texts, sample_keys
from .text_space import TextPrediction
from .transformer import UniViGUTransformer3DModel

# In the loss, 1 - tau is at least this. The velocity is (z_1 - z_tau) / (1 - tau), so near tau = 1 a tiny error of the
# predicted z_1 would outweigh all other samples. Velocity and data are equivalent up to tau = 0.95.
TAU_FLOOR = 0.05
NEGLIGIBLE = 1e-20  # a gradient below this changes no float32 sum that it is part of


def predict_prefix(model: UniViGUTransformer3DModel, draws: Sequence[Samples], table: Tensor, guessing: bool) -> Tensor:
    """The text's h (K B, N, d) for samples under ``prefix``; the video is computed once for all passes of the text.

    ``draws`` are the same B samples with K draws of their texts' noise and times (`redraw_texts`), and h is in their
    order. Under ``prefix`` the video doesn't attend to text, so its keys and values are the same for all draws (eq 14
    without the video's rows), and the K texts are K independent rows beside them: the result is that of K single draws.
    The video's weights learn through its keys and values, from the sum of the draws' gradients. ``guessing``: condition
    each text on its own first estimate of z_1 (self-conditioning).

    Where activations are recomputed, the first estimate has a pass over the video of its own: beside a cached video,
    the backward pass would keep a gradient of every block's keys and values until it reaches the video, 27 GiB of the
    14B at 81 frames of 480x832.
    """
    s = draws[0]
    z, tau = torch.cat([drawn.z_text for drawn in draws]), torch.cat([drawn.text_tau for drawn in draws])
    # under `prefix` every sample has the empty condition, so one row of it is enough
    video = s.z_video, s.video_tau, s.condition[:1]
    guess = torch.zeros_like(z)  # zeros, not None: all steps use the same weights of the text side
    cache = model.prefill_video(*video) if guessing and not model.gradient_checkpointing else None

    def text() -> Tensor:
        if cache is not None:
            return model.denoise_text(z, tau, cache, guess)
        # video and text go through each block together, and no keys or values are kept
        return model(*video, z, tau, guess, attention="text_only").text

    if guessing:
        with torch.no_grad():
            first = text().chunk(len(draws))  # logits of all draws at once would be large
            read = [model.read_text(h, d.z_text, d.text_tau, table) for h, d in zip(first, draws, strict=True)]
            guess = torch.cat([prediction.data for prediction in read])
    return text()


def predict_joint(model: UniViGUTransformer3DModel, s: Samples, table: Tensor, guessing: bool) -> tuple[Tensor, Tensor]:
    """Video velocity (B, C, T, H, W) and the text's h (B, N, d) for samples under ``joint`` (eq 10)."""
    guess = torch.zeros_like(s.z_text)
    if guessing:
        # a text at tau = 1 is given, not denoised: inference has no estimate for it, so training has none either
        rows = s.has_text_loss.nonzero()[:, 0]
        # where ranks differ, the extra pass runs on one patch without such a text: see `training_loss`
        t = s[rows] if len(rows) else s.smallest(model.config.patch_size)
        with torch.no_grad():
            first = model(t.z_video, t.video_tau, t.condition, t.z_text, t.text_tau).text
            if len(rows):
                data = model.read_text(first, t.z_text, t.text_tau, table).data
                guess = torch.zeros_like(s.z_text).index_copy(0, rows, data)
    out = model(s.z_video, s.video_tau, s.condition, s.z_text, s.text_tau, guess)
    return out.video, out.text


def video_losses(velocity: Tensor, s: Samples, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Each sample's contribution to the loss, and its mean squared error of the velocity (eq 11), both (B,)."""
    squares = (velocity.float() - flow.velocity(s.video_noise, s.latents)).square().flatten(1)
    mse = squares.mean(1)
    return (squares.sum(1) if config.form == "literal" else config.video_weight * mse), mse


def text_losses(
    hidden: Tensor,
    s: Samples,
    table: Tensor,
    model: UniViGUTransformer3DModel,
    config: ObjectiveConfig,
    token_weights: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sample's contribution to the loss (B,), and its ``text_mse``, ``text_ce`` and ``token_accuracy`` (B,)."""
    prediction = model.read_text(hidden, s.z_text, s.text_tau, table, TAU_FLOOR)
    data, z = s.text_data, s.z_text
    if config.form == "weighted":
        # E learns from the cross-entropy alone: a target with a gradient is easiest to hit where all rows are equal
        data, z = data.detach(), z.detach()
    if model.config.prediction == "velocity":
        target = flow.velocity(s.text_noise, data)
    else:
        target = flow.data_to_velocity(data, z, s.text_tau, TAU_FLOOR)
    squares = (prediction.velocity - target).square().flatten(1)
    parts = {"text_mse": squares.mean(1)}
    if config.form == "literal":
        patch = model.config.patch_size
        video_tokens = s.latents[0, 0].numel() // (patch[0] * patch[1] * patch[2])
        loss = squares.sum(1) * (video_tokens / s.ids.shape[1])
    else:
        loss = config.text_weight * parts["text_mse"]
    if prediction.logits is not None:
        ce = cross_entropy(prediction.logits, s.ids)
        parts["text_ce"] = ce.mean(1)
        if config.form == "weighted":
            weights = torch.ones_like(ce) if token_weights is None else token_weights[s.ids]
            loss = loss + config.ce_weight * (ce * weights).sum(1) / weights.sum(1)
    parts["token_accuracy"] = token_accuracy(prediction, s.ids, table, model)
    return loss, parts


def mean_text_losses(
    hidden: Tensor,
    draws: Sequence[Samples],
    table: Tensor,
    model: UniViGUTransformer3DModel,
    config: ObjectiveConfig,
    token_weights: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`text_losses` of each sample (B,), averaged over its ``draws``; ``hidden`` (K B, N, d) is in their order.

    With several draws, a model that recomputes its activations recomputes the logits too: at Wan's vocabulary those of
    one draw take 0.26 GB in fp32.
    """
    arguments = (table, model, config, token_weights)
    recompute = len(draws) > 1 and model.gradient_checkpointing and torch.is_grad_enabled()
    found = [
        checkpoint(text_losses, h, drawn, *arguments, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else text_losses(h, drawn, *arguments)
        for h, drawn in zip(hidden.chunk(len(draws)), draws, strict=True)
    ]
    parts = {name: torch.stack([each[name] for _, each in found]).mean(0) for name in found[0][1]}
    return torch.stack([loss for loss, _ in found]).mean(0), parts


def drop_negligible_gradient(hidden: Tensor) -> None:
    """Register a hook that sets entries below `NEGLIGIBLE` to zero in the gradient of `hidden`.

    Near tau = 1 a token can be read from z_tau alone. Its loss is nearly zero, and its gradient becomes denormal in
    float32: a CPU multiplies such matrices a hundred times slower.
    """
    if hidden.requires_grad:
        # pyrefly: ignore[implicit-any-lambda]
        hidden.register_hook(lambda grad: grad.masked_fill(grad.abs() < NEGLIGIBLE, 0.0))


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p of each token: logits (B, N, V), ids (B, N) to (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").unflatten(0, ids.shape)


@torch.no_grad()
def token_accuracy(prediction: TextPrediction, ids: Tensor, table: Tensor, model: UniViGUTransformer3DModel) -> Tensor:
    """Share of each sample's tokens, PAD left out, that are predicted correctly: (B,)."""
    if prediction.logits is None:
        predicted = text_space.nearest(prediction.data, table, model.config.tokenizer_length)
    else:
        predicted = prediction.logits.argmax(-1)
    counted = ids != model.config.pad_token_id
    return ((predicted == ids) & counted).sum(1) / counted.sum(1).clamp_min(1)


def training_loss(
    model: UniViGUTransformer3DModel,
    batch: Batch,
    config: ObjectiveConfig,
    step: int,
    token_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """One batch's ``loss`` (eq 11, or its weighted form) with gradient, and its parts as detached scalars.

    ``step`` decides, identically on all ranks, whether this step is self-conditioned and, with ``task_draw: step``,
    which task it has (`draw_step`). ``token_weights`` (V,) weight the cross-entropy; without them all tokens weigh the
    same. ``loss`` is the mean over all B samples; a modality without loss counts as zero. ``video_mse``, ``text_mse``,
    ``text_ce`` (unweighted) and ``token_accuracy`` are means over the ``video_samples`` and ``text_samples`` of this
    batch, or zero where there are none. Samples are grouped by attention policy, with one forward pass per group. Under
    ``prefix`` each text has ``config.text_draws`` draws, and its loss and its figures are their mean, so that a
    learning rate keeps its meaning.

    All ranks run the same passes, and every output enters ``loss``, even if multiplied by zero: ranks that partition
    weights or gradients (ZeRO) would deadlock where one uses a weight and another does not. A step of one task has one
    pass. Where each sample has its own task there are always two: for a policy without samples the pass has a single
    patch and token.
    """
    table, drawn = model.text_space(), draw_step(step, config)
    keys, samples = sample_keys(batch, config), prepare(batch, table, config, drawn.task)
    # a text that is given has no estimate, so a step of `generate` is not self-conditioned
    guessing = drawn.self_conditioned and (drawn.task is None or "text" in TASKS[drawn.task].loss)
    loss, parts = table.new_zeros(()), {}
    for policy in (True, False) if drawn.task is None else (TASKS[drawn.task].attention == "prefix",):
        rows = (samples.is_prefix == policy).nonzero()[:, 0]
        group = samples[rows] if len(rows) else samples.smallest(model.config.patch_size)
        draws = [group]
        if policy:
            again = range(1, config.text_draws) if len(rows) else ()
            draws += [redraw_texts(group, [keys[i] for i in rows.tolist()], draw, config) for draw in again]
            hidden = predict_prefix(model, draws, table, guessing)
            drop_negligible_gradient(hidden)
            loss = loss + 0 * hidden.sum()
        else:
            video, hidden = predict_joint(model, group, table, guessing)
            drop_negligible_gradient(hidden)
            loss = loss + 0 * (video.float().sum() + hidden.sum())
        if not len(rows):
            continue
        if not policy:
            video_loss, mse = video_losses(video, group, config)
            loss = loss + video_loss.sum()
            parts.setdefault("video_mse", []).append(mse)
        texts = group.has_text_loss.nonzero()[:, 0]
        if len(texts):
            if len(texts) < len(group):  # only under `joint`, where there is one draw
                hidden, draws = hidden[texts], [group[texts]]
            text_loss, values = mean_text_losses(hidden, draws, table, model, config, token_weights)
            loss = loss + text_loss.sum()
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
    return {"loss": loss / len(samples), **_means(parts, table)}


def _means(parts: Mapping[str, Sequence[Tensor]], like: Tensor) -> dict[str, Tensor]:
    """The mean of each part over the batch, zero where it has no samples, and the numbers of samples."""
    out = {}
    for name in ("video_mse", "text_mse", "text_ce", "token_accuracy"):
        values = torch.cat(list(parts[name])).detach() if name in parts else like.new_zeros(0)
        out[name] = values.sum() / max(1, len(values))
        if name.endswith("_mse"):
            out[name.replace("_mse", "_samples")] = torch.tensor(len(values), device=like.device)
    return out


class TrainingObjective(nn.Module):
    """:func:`training_loss` as a module, for engines that need one root ``forward``: ``objective(batch, step)``."""

    def __init__(
        self, transformer: UniViGUTransformer3DModel, config: ObjectiveConfig, token_weights: Tensor | None = None
    ):
        super().__init__()
        if transformer.text_space is None:
            raise ConfigError(
                "A model whose texts are token ids has no training loop here: train one with another `prediction`, or"
                " write a loop with `univigu.discrete`."
            )
        self.transformer = transformer
        self.config = config
        self.register_buffer("token_weights", token_weights, persistent=False)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return training_loss(self.transformer, batch, self.config, step, self.token_weights)
