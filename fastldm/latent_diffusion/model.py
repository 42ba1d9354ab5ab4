"""`LatentDiffusion`: encode, loss, sample, decode, save and load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fastldm.errors import ConfigError, DataError
from fastldm.latent_diffusion.conditioning import (
    CONDITIONING_KINDS,
    ConditionEncoder,
    Conditioning,
    caption_length,
    condition_size,
    masks_padding,
    repeat_condition,
)
from fastldm.latent_diffusion.files import FileMethods
from fastldm.latent_diffusion.latents import LatentSpace, dtype_of
from fastldm.latent_diffusion.parts import check_parts, latent_size_of, warn_of_clipping
from fastldm.latent_diffusion.sampling import (
    SamplerOptions,
    StepCallback,
    check_sampler,
    make_generators,
    run_sampler,
)
from fastldm.losses.diffusion import DiffusionLoss, DiffusionLossConfig
from fastldm.models.base import ModelMixin
from fastldm.schedulers import randn


class LatentDiffusion(FileMethods, LatentSpace):
    """A first stage between images and latents, and a diffusion model of the latents.

    The UNet models z = (z_raw − mean)·factor/std of the first stage's latents z_raw; `encode`,
    `loss`, `sample` and `decode` all speak of that z. The first stage is frozen. A call of the
    object is `loss`, so that wrappers for distributed training can take it as it is.

    Args:
        first_stage: `AutoencoderKL` or `VQModel`, whose parameters are frozen here.
        unet: `UNet2DModel` or `UNet2DConditionModel`.
        scheduler: the noise schedule that is trained on, and the default sampler: one of
            fastldm's, or an object with diffusers' interface.
        conditioner: `TextEncoder`, `ClassEmbedder`, a text encoder of transformers, or, for
            ``"concat"``, a module that makes the channels to append.
        conditioning: ``"none"``; ``"crossattn"``: a context from `conditioner`, or given as it
            is; ``"concat"``: channels appended to z; ``"hybrid"``: both; ``"class"``: classes
            through the UNet's own embedding, or through a `ClassEmbedder` as context.
        tokenizer: for captions: a `CaptionTokenizer` or a tokenizer of transformers.
        scaling_factor: by default that of the first stage's config; see `calibrate_scale`.
        latent_mean, latent_std: of each channel; by default those of the first stage's config.
        conditioning_dropout: share of the samples trained without condition, for guidance.
        train_conditioner: whether `conditioner` is trained, too; by default fastldm's own are and
            others are frozen.
        use_attention_mask: whether padding tokens are hidden from text encoder and UNet; by
            default as the encoder's config says, else for all encoders but CLIP's.
        max_caption_length: tokens of a caption; by default what tokenizer and encoder can do, at
            most 77.
        loss: terms and weights of the loss.

    Raises:
        ConfigError: a value is not accepted, or two parts do not fit each other; both are named.
    """

    def __init__(
        self,
        first_stage: nn.Module,
        unet: nn.Module,
        scheduler: Any,
        conditioner: nn.Module | None = None,
        *,
        conditioning: str = "none",
        tokenizer: Any | None = None,
        scaling_factor: float | None = None,
        latent_mean: Sequence[float] | None = None,
        latent_std: Sequence[float] | None = None,
        conditioning_dropout: float = 0.0,
        train_conditioner: bool | None = None,
        use_attention_mask: bool | None = None,
        max_caption_length: int | None = None,
        loss: DiffusionLossConfig | None = None,
    ) -> None:
        if conditioning not in CONDITIONING_KINDS:
            raise ConfigError(
                f"conditioning: got {conditioning!r}; accepted: {', '.join(CONDITIONING_KINDS)}"
            )
        if not 0 <= conditioning_dropout <= 1 or (conditioning == "none" and conditioning_dropout):
            raise ConfigError(
                f"conditioning_dropout: got {conditioning_dropout}; accepted: a share in [0, 1], "
                "and 0 for conditioning 'none'"
            )
        check_parts(conditioning, first_stage, unet, conditioner, tokenizer)
        warn_of_clipping(scheduler)
        super().__init__(first_stage, scaling_factor, latent_mean, latent_std)
        self.unet: Any = unet
        self.conditioner: Any = conditioner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.conditioning = conditioning
        self.conditioning_dropout = conditioning_dropout
        if train_conditioner is None:
            train_conditioner = isinstance(conditioner, ModelMixin)
        self.train_conditioner = train_conditioner and conditioner is not None
        if conditioner is not None and not self.train_conditioner:
            conditioner.requires_grad_(False).eval()
        if use_attention_mask is None:
            use_attention_mask = masks_padding(conditioner)
        self.use_attention_mask = use_attention_mask
        self.max_caption_length = max_caption_length or caption_length(conditioner, tokenizer)
        self.objective = DiffusionLoss(
            loss or DiffusionLossConfig(),
            scheduler.alphas_cumprod,
            scheduler.config.prediction_type,
        )

    def train(self, mode: bool = True) -> Self:
        """Set training mode; the first stage and a frozen conditioner stay in eval mode."""
        super().train(mode)
        self.first_stage.eval()
        if self.conditioner is not None and not self.train_conditioner:
            self.conditioner.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Device of the UNet's first parameter."""
        return next(self.unet.parameters()).device

    def encode_condition(
        self, cond: Any, batch_size: int, drop: Tensor | None = None
    ) -> Conditioning:
        """The UNet's inputs for a batch of conditions; see `ConditionEncoder`."""
        encoder = ConditionEncoder(
            kind=self.conditioning,
            model=self.conditioner,
            tokenizer=self.tokenizer,
            max_caption_length=self.max_caption_length,
            use_attention_mask=self.use_attention_mask,
            concat_channels=self.unet.config["in_channels"] - self.latent_channels,
            num_class_embeds=self.unet.config.get("num_class_embeds"),
        )
        return encoder(cond, batch_size, self.device, drop)

    def predict(self, z_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's prediction.

        Args:
            z_t: [B, C, h, w].
            timesteps: int64 [B] or [].
            conditioning: from `encode_condition`.

        Returns:
            ε, z or v, as the schedule's ``prediction_type`` says, [B, C, h, w].

        Raises:
            DataError: the condition to concatenate has another size than z_t.
        """
        dtype = dtype_of(self.unet)
        inputs = z_t.to(dtype)
        if conditioning.concat is not None:
            if conditioning.concat.shape[2:] != z_t.shape[2:]:
                raise DataError(
                    f"cond: the condition to concatenate is {list(conditioning.concat.shape[2:])}, "
                    f"z is {list(z_t.shape[2:])}"
                )
            inputs = torch.cat([inputs, conditioning.concat.to(dtype)], dim=1)
        arguments: dict[str, Any] = {}
        if conditioning.class_labels is not None:
            arguments["class_labels"] = conditioning.class_labels
        if conditioning.hidden_states is not None:
            arguments["encoder_hidden_states"] = conditioning.hidden_states.to(dtype)
        if conditioning.attention_mask is not None:
            arguments["encoder_attention_mask"] = conditioning.attention_mask
        return self.unet(inputs, timesteps, **arguments).sample

    def loss(
        self,
        z: Tensor,
        cond: Any = None,
        *,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss (paper, eq. 2 and 3).

        Args:
            z: from `encode`, [B, C, h, w].
            cond: the conditions, as `ConditionEncoder` takes them.
            noise: standard normal, shape of `z`.
            timesteps: int64 [B] in [0, T).
            drop: bool [B], the samples to train without condition.
            generator: draws those of the three that are not given, in the order timesteps, noise,
                drop; a CPU generator gives the same numbers for every device. In eval mode no
                condition is dropped unless `drop` says so.

        Returns:
            The loss, and detached scalars to log (see `DiffusionLoss`).

        Raises:
            DataError: z or the conditions have another shape or type.
        """
        self._check_latents(z)
        batch_size = z.shape[0]
        source = z.device if generator is None else generator.device
        if timesteps is None:
            timesteps = torch.randint(
                self.objective.num_timesteps, (batch_size,), generator=generator, device=source
            )
        timesteps = timesteps.to(z.device)
        if noise is None:
            noise = randn(z.shape, generator, z.device, z.dtype)
        if drop is None and self.training and self.conditioning_dropout > 0:
            uniform = torch.rand(batch_size, generator=generator, device=source)
            drop = uniform < self.conditioning_dropout
        conditioning = self.encode_condition(cond, batch_size, drop)
        z_t = self.objective.diffuse(z, noise, timesteps)
        output = self.predict(z_t, timesteps, conditioning)
        return self.objective(output, self.objective.target(z, noise, timesteps), timesteps)

    forward = loss

    @torch.no_grad()
    def sample(
        self,
        num_images: int | None = None,
        *,
        captions: Sequence[str] | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        conditioning: Any = None,
        negative: Any = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        seeds: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        scheduler: Any | None = None,
        size: tuple[int, int] | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
        output: Literal["images", "latents"] = "images",
    ) -> Tensor:
        """Draw images.

        An image depends on its own seed and condition, not on the others of the batch (up to the
        rounding of the kernels that a batch size chooses).

        Args:
            num_images: B; by default the number of conditions. One condition serves all B.
            captions, class_labels, conditioning: the conditions: one of them, as
                `ConditionEncoder` takes it.
            negative: conditions that guidance leads away from, in place of "no condition".
            num_inference_steps: steps of the sampler.
            guidance_scale: s of classifier-free guidance; with 1 the UNet sees only the
                conditional half.
            guidance_rescale: φ of 2305.08891, section 3.4.
            eta: η of DDIM, 0 deterministic.
            seeds: one an image; or one int for `seeds`, `seeds` + 1, …; None draws them from
                torch's global generator.
            latents: standard normal noise to start from, [B, C, h, w], in place of one that the
                seeds draw. The sampler's steps are computed in its dtype.
            scheduler: sampler in place of the object's own.
            size: height and width of the images in pixels; by default those of the UNet's
                ``sample_size``, or of the condition to concatenate.
            callback: called after each step with (step_index, timestep, z).
            progress: show a progress bar.
            output: ``"images"`` or ``"latents"``.

        Returns:
            Images [B, channels, H, W] in [−1, 1], or z [B, C, h, w]; float32, z in the dtype of
            `latents` where these are given.

        Raises:
            DataError: the conditions or seeds do not fit the model or the number of images.
            ConfigError: guidance without conditioning, or a sampler for another prediction type.
        """
        if output not in ("images", "latents"):
            raise ConfigError(f"output: got {output!r}; accepted: 'images', 'latents'")
        cond = _one_of(captions=captions, class_labels=class_labels, conditioning=conditioning)
        if latents is not None:
            self._check_latents(latents)
            num_images = len(latents) if num_images is None else num_images
            if len(latents) != num_images:
                raise DataError(f"latents: got {len(latents)} for {num_images} images")
        if num_images is None:
            num_images = 1 if cond is None else condition_size(cond)
        guided = guidance_scale != 1.0
        if guided and self.conditioning == "none":
            raise ConfigError(
                f"guidance_scale: got {guidance_scale}; an unconditional model has no guidance"
            )
        sampler = self.scheduler if scheduler is None else scheduler
        check_sampler(sampler, self.objective.prediction_type)
        generators = make_generators(seeds, num_images)
        with self._in_eval_mode():
            cond = repeat_condition(cond, num_images)
            conditional = self.encode_condition(cond, num_images)
            unconditional = None
            if guided and negative is None:
                everyone = torch.ones(num_images, dtype=torch.bool)
                unconditional = self.encode_condition(cond, num_images, everyone)
            elif guided:
                negative = repeat_condition(negative, num_images)
                unconditional = self.encode_condition(negative, num_images)
            if latents is None:
                side = latent_size_of(self.first_stage, self.unet, size, conditional.concat)
                shape = (num_images, self.latent_channels, *side)
                latents = randn(shape, generators, self.device, torch.float32)
            z = run_sampler(
                self.predict,
                sampler,
                latents.to(self.device),
                generators,
                conditional,
                unconditional,
                SamplerOptions(
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    guidance_rescale=guidance_rescale,
                    eta=eta,
                    callback=callback,
                    progress=progress,
                ),
            )
            return z if output == "latents" else self.decode(z).float().clamp(-1, 1)

    @contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    @contextmanager
    def using(
        self, *, unet: nn.Module | None = None, conditioner: nn.Module | None = None
    ) -> Iterator[Self]:
        """Put other weights, such as moving averages, in the place of the trained ones for a while.

        Args:
            unet, conditioner: modules of the same architecture; None leaves the part as it is.
        """
        trained = self.unet, self.conditioner
        self.unet = trained[0] if unet is None else unet
        self.conditioner = trained[1] if conditioner is None else conditioner
        try:
            yield self
        finally:
            self.unet, self.conditioner = trained


def _one_of(**conditions: Any) -> Any:
    given = {name: value for name, value in conditions.items() if value is not None}
    if len(given) > 1:
        raise DataError(f"{', '.join(given)}: give one of them")
    return next(iter(given.values()), None)
