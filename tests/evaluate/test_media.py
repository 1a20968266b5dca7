"""Images and sounds from files."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from reshard.errors import FormatError, UnsupportedError
from reshard.evaluate.media import load_audio, load_image, resample
from tests.evaluate import tiny


def _frequency(samples: np.ndarray[tuple[int], np.dtype[np.float32]], rate: int) -> float:
    """The loudest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples))
    return float(spectrum.argmax() * rate / len(samples))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_a_tone_keeps_its_pitch_and_loudness(tmp_path: Path, rate: int) -> None:
    path = tiny.tone(tmp_path / "tone.wav", hertz=440, rate=rate, seconds=0.5)
    samples = load_audio(path, 16000)
    assert samples.dtype == np.float32
    assert len(samples) == 8000
    assert _frequency(samples, 16000) == pytest.approx(440, abs=2)
    assert float(np.sqrt(np.mean(samples**2))) == pytest.approx(0.5 / np.sqrt(2), rel=0.01)


def test_what_lies_above_the_new_limit_is_removed() -> None:
    time = np.arange(44100) / 44100
    high = np.sin(2 * np.pi * 15000 * time).astype(np.float32)
    assert float(np.abs(resample(high, 44100, 16000)).max()) < 1e-3


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_width_of_pcm(tmp_path: Path, width: int, channels: int) -> None:
    path = tmp_path / "sound.wav"
    full = 2 ** (8 * width - 1)
    values = [0.0, 0.5, -1.0]
    offset = full if width == 1 else 0
    data = b"".join(
        int(value * full + offset).to_bytes(width, "little", signed=width > 1) * channels
        for value in values
    )
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(16000)
        sound.writeframes(data)
    assert load_audio(path, 16000).tolist() == values


def test_what_is_no_sound_or_image(tmp_path: Path) -> None:
    path = tmp_path / "fake.wav"
    path.write_bytes(b"RIFF but not really")
    with pytest.raises(FormatError, match="not PCM WAV"):
        load_audio(path, 16000)
    with pytest.raises(FormatError, match="not an image"):
        load_image(path)
    other = tmp_path / "fake.mp3"
    other.write_bytes(b"neither")
    with pytest.raises(UnsupportedError, match="WAV"):
        load_audio(other, 16000)


def test_images_are_rgb(tmp_path: Path) -> None:
    loaded = load_image(tiny.image(tmp_path / "picture.png"))
    assert (loaded.mode, loaded.size) == ("RGB", (56, 42))
