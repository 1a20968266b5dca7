"""Images and sound from files, as processors take them."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reshard.errors import FormatError, UnsupportedError

Samples = npt.NDArray[np.float32]


def load_image(path: Path) -> Any:
    """An image file as a PIL image in RGB; raises `FormatError` for any other file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise FormatError("the file is not an image that Pillow can read.", path=path) from error


def load_audio(path: Path, rate: int) -> Samples:
    """A sound file as mono samples in [-1, 1] at `rate` a second.

    WAV (PCM) is read here; other formats need a decoder that transformers knows, such as
    soundfile. Raises `FormatError` and `UnsupportedError`.
    """
    if path.suffix.lower() == ".wav":
        samples, found = _read_wav(path)
        return resample(samples, found, rate)
    from transformers.audio_utils import load_audio as decode

    try:
        decoded: Samples = decode(str(path), sampling_rate=rate)
    except (ImportError, RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"the sound cannot be decoded: {error}", path=path, hint="Give it as a WAV file."
        ) from error
    return decoded


def resample(samples: Samples, rate: int, new_rate: int) -> Samples:
    """Band-limited resampling of a whole recording from `rate` to `new_rate` samples a second.

    The spectrum is cut or padded with zeros, so a tone below both Nyquist limits stays the tone.
    """
    if rate == new_rate or not len(samples):
        return samples
    length = max(1, round(len(samples) * new_rate / rate))
    spectrum = np.fft.rfft(samples)
    kept = np.zeros(length // 2 + 1, dtype=spectrum.dtype)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    return (np.fft.irfft(kept, n=length) * (length / len(samples))).astype(np.float32)


def _read_wav(path: Path) -> tuple[Samples, int]:
    try:
        with wave.open(str(path), "rb") as sound:
            width, channels = sound.getsampwidth(), sound.getnchannels()
            rate, data = sound.getframerate(), sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise FormatError(f"the file is not PCM WAV: {error}.", path=path) from error
    data = data[: len(data) - len(data) % (width * channels)]
    samples = _decode_pcm(np.frombuffer(data, dtype=np.uint8), width)
    return samples.reshape(-1, channels).mean(axis=1, dtype=np.float32), rate


def _decode_pcm(data: npt.NDArray[np.uint8], width: int) -> Samples:
    """Little-endian PCM, `width` bytes a sample, to [-1, 1); 8 bits are unsigned, more signed."""
    if width == 1:
        whole, full = data.astype(np.float32) - np.float32(128), 128.0
    else:
        padded = np.zeros((len(data) // width, 4), dtype=np.uint8)
        padded[:, 4 - width :] = data.reshape(-1, width)
        whole, full = padded.view("<i4").reshape(-1).astype(np.float32), 2.0**31
    samples: Samples = whole / np.float32(full)
    return samples
