"""How well media came through a codec: against what they were, and against ways that need no training."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel

from model import MegaTransformerVocoder, codec_media, waveform_of

from .tables import format_table

try:
    from pesq import PesqError
except ImportError:
    PesqError = None

SHORTEST_FOR_PESQ = 0.4
"""Seconds; of shorter waveforms the measure says little, or nothing."""
RATES_OF_PESQ = {8000: "nb", 16000: "wb"}
STFT_SIZES = (128, 256, 512, 1024)
MOST_MEDIA_FOR_COMPONENTS = 20_000

Batch = Mapping[str, torch.Tensor]


class ImageScores:
    """Scores of each image: psnr, the peak signal-to-noise ratio in dB, and ssim, the structural similarity."""

    names = ("psnr", "ssim")

    def __call__(self, made: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Reconstructions of `pixel_values`, (images, channels, height, width) in -1 .. 1, to (images, scores)."""
        # Here and below, so that runs that score no codec do not wait for the import.
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        images, made = batch["pixel_values"].float(), made.float().clamp(-1, 1)
        psnr = peak_signal_noise_ratio(made, images, data_range=2.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(made, images, data_range=2.0, reduction="none")
        return torch.stack([psnr, ssim], dim=1)


class AudioScores:
    """Scores of each waveform: mel_l1, the mean error of its log-mel spectrogram; mr_stft, that of its spectrograms;
    and si_sdr, the scale-invariant signal-to-distortion ratio in dB, which wants right phases, NaN for silence.

    Where the package pesq is installed and knows the sampling rate (narrow-band at 8 kHz, wide-band at 16), also pesq,
    about 1 to 4.5, and pesq_failed, 1 for a waveform that it could not rate, such as a silent one, whose pesq is NaN.
    Both are NaN for waveforms that are too short.

    Args:
        log_mel: (waveforms, samples) -> (waveforms, mel bins, frames).
    """

    def __init__(self, sampling_rate: int, log_mel: Callable[[torch.Tensor], torch.Tensor]):
        self.sampling_rate, self.log_mel = sampling_rate, log_mel
        has_pesq = PesqError is not None and sampling_rate in RATES_OF_PESQ
        self.names = ("mel_l1", "mr_stft", "si_sdr", *(("pesq", "pesq_failed") if has_pesq else ()))

    def __call__(self, made: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Reconstructions of `waveforms`, (items, samples), of which the first `lengths` count, to (items, scores)."""
        scores = []
        for sound, waveform, length in zip(made, batch["waveforms"], batch["lengths"].tolist(), strict=True):
            length = min(length, len(sound))
            scores.append(self._score_one(sound[:length].float(), waveform[:length].float()))
        return torch.tensor(scores, device=made.device)

    def _score_one(self, made: torch.Tensor, waveform: torch.Tensor) -> list[float]:
        from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

        mel_l1 = (self.log_mel(made[None]) - self.log_mel(waveform[None])).abs().mean()
        si_sdr = scale_invariant_signal_distortion_ratio(made, waveform) if waveform.any() else float("nan")
        scores = [float(mel_l1), stft_distance(made, waveform), float(si_sdr)]
        return [*scores, *self._pesq(made, waveform)] if "pesq" in self.names else scores

    def _pesq(self, made: torch.Tensor, waveform: torch.Tensor) -> tuple[float, float]:
        """pesq and pesq_failed."""
        from torchmetrics.functional.audio.pesq import perceptual_evaluation_speech_quality

        if len(waveform) < SHORTEST_FOR_PESQ * self.sampling_rate:
            return float("nan"), float("nan")
        try:
            mode = RATES_OF_PESQ[self.sampling_rate]
            return float(perceptual_evaluation_speech_quality(made, waveform, self.sampling_rate, mode)), 0.0
        except PesqError:
            return float("nan"), 1.0


def stft_distance(made: torch.Tensor, waveform: torch.Tensor) -> float:
    """Mean over `STFT_SIZES` of |S - S'| / |S| and mean |ln S - ln S'| together, of two sounds (samples,).

    Source: Yamamoto et al. 2019, arXiv 1910.11480.
    """
    total = 0.0
    for size in STFT_SIZES:
        window = torch.hann_window(size, device=made.device)
        options = {"hop_length": size // 4, "window": window, "pad_mode": "constant", "return_complex": True}
        ours, theirs = (
            torch.stft(sound, size, **options).abs().square().clamp(min=1e-7).sqrt() for sound in (made, waveform)
        )
        total += float((theirs - ours).norm() / theirs.norm() + (theirs.log() - ours.log()).abs().mean())
    return total / len(STFT_SIZES)


def mean_scores(prediction: EvalPrediction, names: Sequence[str]) -> dict[str, float]:
    """`compute_metrics` for the trainer: means of the scores of all media, without those that are NaN."""
    means = torch.as_tensor(prediction.predictions).nanmean(dim=0)
    return {name: float(mean) for name, mean in zip(names, means, strict=True) if not mean.isnan()}


@torch.no_grad()
def reconstruction_scores(
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    collate: Callable[[Sequence[torch.Tensor]], Batch],
    scores: ImageScores | AudioScores,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Means of the scores of a way to reconstruct media, one after another, and "milliseconds" for each.

    Args:
        reconstruct: A batch of one medium to its reconstruction.
        dataset: Media.
        collate: Makes a batch of a list of them; the medium comes first in it.
    """
    rows, seconds = [], 0.0
    for number in tqdm(range(len(dataset)), desc="reconstructing", disable=None, leave=False):
        batch = {name: value.to(device) for name, value in collate([dataset[number]]).items()}
        start = time.perf_counter()
        made = reconstruct(next(iter(batch.values()))).cpu()
        seconds += time.perf_counter() - start
        rows.append(scores(made, {name: value.cpu() for name, value in batch.items()}))
    means = mean_scores(EvalPrediction(torch.cat(rows).numpy(), None), scores.names)
    return means | {"milliseconds": 1000 * seconds / len(dataset)}


class PrincipalComponents:
    """The linear way to describe media of one shape by so many numbers that loses the least on those it was made of.

    Args:
        media: (media, ...), at least as many as numbers.
        num_numbers: How many numbers describe a medium.

    Raises:
        ValueError: There are fewer media than numbers.
    """

    def __init__(self, media: torch.Tensor, num_numbers: int):
        if len(media) < num_numbers:
            raise ValueError(
                f"{len(media)} media do not have {num_numbers} principal components; take at least as many media"
            )
        vectors = media.flatten(1).float()
        self.mean = vectors.mean(dim=0)
        # More directions and iterations than the default, so that those that are kept are the exact ones, nearly.
        num_tried = min(num_numbers + max(10, num_numbers // 4), *vectors.shape)
        _, _, directions = torch.svd_lowrank(vectors - self.mean, q=num_tried, niter=6)
        self.directions = directions[:, :num_numbers]

    def __call__(self, media: torch.Tensor) -> torch.Tensor:
        """(media, ...) -> their reconstructions, of the same shape."""
        numbers = (media.flatten(1).float() - self.mean) @ self.directions
        return (numbers @ self.directions.T + self.mean).view(media.shape)


def reconstruction_table(
    model: PreTrainedModel, train: Dataset, validation: Mapping[str, Dataset], limit: int | None = None
) -> str:
    """Scores of a codec and of the other way, for each source, as Markdown.

    Args:
        model: Autoencoder of images, next to principal components, or vocoder, next to Griffin and Lim's iteration.
        train: Media that the codec was trained on, of which the components are.
        validation: Media that are reconstructed, by source.
        limit: How many of each source; default: all.
    """
    media, scores = codec_media(model.config), codec_scores(model)
    ways = ways_of_images(model, train) if media.name == "image" else ways_of_audio(model)
    lines = []
    for source, dataset in validation.items():
        part = dataset if limit is None else Subset(dataset, range(min(limit, len(dataset))))
        for name, reconstruct in ways.items():
            found = reconstruction_scores(reconstruct, part, media.collate_codec_inputs, scores, model.device)
            if media.name == "audio":
                seconds = sum(len(part[number]) for number in range(len(part))) / media.sampling_rate / len(part)
                found["x real time"] = 1000 * seconds / found["milliseconds"]
            lines.append((source, name, found))
    names = list(dict.fromkeys(key for *_, found in lines for key in found))
    body = [[source, name, *(f"{found.get(key, float('nan')):.3f}" for key in names)] for source, name, found in lines]
    return format_table(["source", "way", *names], body)


def codec_scores(model: PreTrainedModel) -> ImageScores | AudioScores:
    """The scores of the media that a codec reconstructs."""
    media = codec_media(model.config)
    return ImageScores() if media.name == "image" else AudioScores(media.sampling_rate, model.log_mel)


def ways_of_images(model: PreTrainedModel, train: Dataset) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The autoencoder, also with refined latents if it refines them, and as many principal components of train images
    as it has numbers.
    """
    num_numbers = model.num_tokens * model.latent_size
    images = torch.stack([train[number] for number in range(min(len(train), MOST_MEDIA_FOR_COMPONENTS))])
    components = PrincipalComponents(images, num_numbers)
    name = f"autoencoder, {num_numbers} of {images[0].numel()} numbers"
    ways = {name: lambda pixels: model(pixels).reconstruction}
    if count := model.num_refinement_steps:
        ways[f"{name}, refined in {count} steps"] = lambda pixels: model.decode(
            model.refine(pixels, model.encode(pixels))
        )
    return ways | {f"{num_numbers} principal components": lambda pixels: components(pixels.cpu())}


def ways_of_audio(model: MegaTransformerVocoder) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The vocoder, and Griffin and Lim's iteration; both from log-mel spectrograms."""
    config = model.config

    def griffin_lim(waveforms: torch.Tensor) -> torch.Tensor:
        (log_mel,) = model.log_mel(waveforms)
        return waveform_of(log_mel, config.sampling_rate, config.n_fft, config.hop_length)[None]

    return {"vocoder": lambda waveforms: model.decode(model.log_mel(waveforms)), "Griffin-Lim": griffin_lim}
