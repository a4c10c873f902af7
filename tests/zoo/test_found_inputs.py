"""Models of the usual libraries tell of their inputs: what is found runs, has padding, and is enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import InputError
from normfuse.sources.found_inputs import found_on
from normfuse.sources.index_limits import integer_limits
from tests.zoo import torchvision_shim
from tests.zoo.spread import spread

torchvision_shim.install()

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

transformers: Any = pytest.importorskip("transformers")

WORDS = 60
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
TEXT = LAYERS | ENDS | {"vocab_size": WORDS}
PATCHES: dict[str, Any] = LAYERS | {"image_size": 32, "patch_size": 8}
SIDES: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
PAIR = SIDES | ENDS | {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": WORDS}
GPT2: dict[str, Any] = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "eos_token_id": 2}
OPT = TEXT | {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 40}
SOUND = LAYERS | {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = PAIR | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}

SENTENCES: dict[str, tuple[int, ...]] = {"input_ids": (2, 16), "attention_mask": (2, 16)}
TRANSLATED = SENTENCES | {"decoder_input_ids": (2, 8)}
PICTURES: dict[str, tuple[int, ...]] = {"pixel_values": (2, 3, 32, 32)}

# model class, configuration class, settings, what is found
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, SENTENCES),
    "gpt2_without_padding": ("GPT2ForSequenceClassification", "GPT2Config", GPT2, dict.fromkeys(SENTENCES, (1, 16))),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT, SENTENCES),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": WORDS, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
        SENTENCES,
    ),
    "roberta": ("RobertaModel", "RobertaConfig", TEXT, SENTENCES),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, SENTENCES),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT | {"num_key_value_heads": 1}, SENTENCES),
    "mamba": ("MambaModel", "MambaConfig", {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1}, SENTENCES),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": WORDS, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8},
        TRANSLATED,
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", PAIR, TRANSLATED),
    "bart_of_whole_sentences": ("BartForSequenceClassification", "BartConfig", PAIR, SENTENCES),
    "marian": ("MarianMTModel", "MarianConfig", PAIR | {"decoder_start_token_id": 1}, TRANSLATED),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        {"input_features": (2, 8, 40), "decoder_input_ids": (2, 5)},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SOUND | {"vocab_size": WORDS}, {"input_values": (2, 170)}),
    "ast": ("ASTModel", "ASTConfig", LAYERS | {"max_length": 64, "num_mel_bins": 32}, {"input_values": (2, 64, 32)}),
    "vit": ("ViTModel", "ViTConfig", PATCHES, PICTURES),
    "convnext": ("ConvNextModel", "ConvNextConfig", CONVNEXT, PICTURES),
    "videomae": ("VideoMAEModel", "VideoMAEConfig", PATCHES | {"num_frames": 4}, {"pixel_values": (2, 4, 3, 32, 32)}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": PATCHES, "projection_dim": 16},
        SENTENCES | PICTURES,
    ),
}


def built(name: str) -> nn.Module:
    model, config, settings, _ = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(getattr(transformers, model)(getattr(transformers, config)(**settings))).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_transformers_runs_on_what_it_tells(name: str) -> None:
    model = built(name)
    state = torch.random.get_rng_state()
    inputs = found_on(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert inputs is not None
    assert inputs.args == ()
    assert {key: tuple(value.shape) for key, value in inputs.kwargs.items()} == FAMILIES[name][3]
    assert all(limit == WORDS for limit in integer_limits(model, inputs).values())
    ids = inputs.kwargs.get("input_ids")
    if ids is not None and len(ids) > 1:
        mask, pad = inputs.kwargs["attention_mask"], FAMILIES[name][2].get("pad_token_id")
        assert mask.sum(-1).tolist() == [16, 12]
        assert ids.max() > WORDS // 2
        assert pad is None or torch.equal(ids == pad, mask == 0)


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "wav2vec2"])
def test_a_model_of_transformers_is_rewritten_without_inputs(name: str) -> None:
    assert normfuse.rewrite(built(name), "all").report.evidence.ok


@pytest.mark.parametrize("name", ["bert", "distilbert", "opt", "bart", "llama", "mamba", "vit", "convnext", "clip", "ast"])
def test_a_model_of_transformers_is_traced_without_inputs(name: str) -> None:
    assert normfuse.inspect(built(name)).norms


def test_what_is_left_out_is_told() -> None:
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**PATCHES)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=59)
    inputs = found_on(transformers.LlavaForConditionalGeneration(config).eval())
    assert inputs is not None
    assert {key: tuple(value.shape) for key, value in inputs.kwargs.items()} == SENTENCES
    assert 59 not in inputs.kwargs["input_ids"]
    assert "leave out pixel_values" in inputs.notes[0]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit", {"image_size": 10**9}),
        ("vit", {"image_size": -4}),
        ("vit", {"image_size": "x"}),
        ("vit", {"num_channels": 0}),
        ("whisper", {"num_mel_bins": "x"}),
        ("whisper", {"num_mel_bins": -1}),
        ("whisper", {"max_source_positions": 10**12}),
        ("wav2vec2", {"conv_stride": [10**9] * 1000, "conv_kernel": [10**9] * 1000}),
        ("wav2vec2", {"conv_stride": 3}),
        ("wav2vec2", {"conv_kernel": []}),
        ("ast", {"max_length": [10**9]}),
        ("videomae", {"num_frames": 10**9}),
    ],
    ids=str,
)
def test_a_hostile_configuration_is_a_line(name: str, settings: dict[str, Any]) -> None:
    model: Any = built(name)
    for key, value in settings.items():
        model.config.__dict__[key] = value
    with pytest.raises(InputError):
        normfuse.inspect(model)


@pytest.mark.parametrize(
    "settings", [{"vocab_size": 10**15}, {"vocab_size": "x"}, {"pad_token_id": [3]}, {"max_position_embeddings": 1}]
)
def test_what_a_configuration_says_of_words_is_not_trusted(settings: dict[str, Any]) -> None:
    model: Any = built("bert")
    model.config.__dict__.update(settings)
    inputs = found_on(model)
    assert inputs is not None
    assert integer_limits(model, inputs) == {"input_ids": WORDS}


def test_models_of_timm_tell_their_sizes() -> None:
    timm = pytest.importorskip("timm")
    for name, settings, shape in (
        ("vit_tiny_patch16_224", {"depth": 1}, (2, 3, 224, 224)),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 64, "in_chans": 1}, (2, 1, 64, 64)),
        ("test_resnet", {}, (2, 3, 160, 160)),
    ):
        inputs = found_on(timm.create_model(name, **settings).eval())
        assert inputs is not None
        assert tuple(inputs.args[0].shape) == shape


def test_models_of_torchvision_begin_with_their_channels() -> None:
    models = pytest.importorskip("torchvision").models
    for build, shape in (
        (lambda: models.squeezenet1_1(), (2, 3, 224, 224)),
        (lambda: models.VisionTransformer(32, 8, 1, 2, 16, 32), (2, 3, 32, 32)),
        (lambda: models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), (2, 3, 224, 224)),
        (lambda: models.video.r3d_18(), (2, 3, 8, 112, 112)),
    ):
        inputs = found_on(build().eval())
        assert inputs is not None
        assert tuple(inputs.args[0].shape) == shape


class Lightning(nn.Module):
    """Tells of its inputs as Lightning's modules do."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.example_input_array = example

    def forward(self, x: Tensor, *, shift: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(self.layer(x))
        return y if shift is None else y + shift


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("example", [X, (X,), {"x": X, "shift": X[:, :1]}], ids=["tensor", "tuple", "dict"])
def test_a_module_of_lightning_has_an_example(example: Any) -> None:
    assert normfuse.rewrite(spread(Lightning(example)).eval(), "all").report.evidence.ok


def test_an_example_on_which_a_model_does_not_run_is_a_line() -> None:
    with pytest.raises(InputError, match="inputs were found on Lightning, but") as caught:
        normfuse.inspect(Lightning(X[:, :2]))
    assert "its forward takes x (required); shift (optional)" in str(caught.value.hint)
