"""The zoo: real classes of timm, torchvision, transformers and torch, tiny, with weights that hide nothing.

Every entry says how many LayerNorm calls its exported graph has, and how many of them can become RMSNorm exactly by the
region rule: what writes the norm's input can be made to have no mean over the feature axis, and nobody sees that mean.
The first is free where a weight can be centred (linear, convolution, embedding, token). Otherwise it costs one explicit
mean-subtraction, which is allowed where it pays for more than one norm; "for n ops" in a note counts those. "Untie"
means: the table is also the output projection, so a copy of it is centred. L is the number of layers, 2 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import torchvision_shim
from tests.zoo.spread import spread

torchvision_shim.install()  # before timm and transformers, which the builders import

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

VOCABULARY = 99
START, END, PAD = 1, 2, 0


@dataclass(frozen=True)
class ZooModel:
    """One architecture: how to build it, what to call it with, and what a rewrite may do to its norms."""

    name: str
    build: Callable[[], nn.Module]  # seeded, spread, in eval mode
    inputs: Callable[[nn.Module], Inputs]  # positional and keyword arguments, the same at every call
    layer_norms: int  # aten.layer_norm calls in the exported graph
    convertible: int | None  # of these, how many can become RMSNorm exactly
    note: str


def tiny(build: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A builder for `build(*args, **options)` with spread weights, in eval mode."""

    def build_spread() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return spread(build(*args, **options)).eval()

    return build_spread


# --- inputs -----------------------------------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _tokens(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def image(model: nn.Module, size: int = 32) -> Inputs:
    """Two RGB images."""
    return (torch.randn(2, 3, size, size, generator=_generator()),), {}


def pixel_values(model: nn.Module) -> Inputs:
    """Two RGB images, under the name that transformers gives them."""
    (pixels,), _ = image(model)
    return (), {"pixel_values": pixels}


def input_ids(model: nn.Module) -> Inputs:
    """Two sequences of ten tokens."""
    return (), {"input_ids": _tokens((2, 10), _generator())}


def input_ids_with_end(model: nn.Module) -> Inputs:
    """Two sequences with an end token, where CLIP pools."""
    tokens = _tokens((2, 10), _generator())
    tokens[:, 7] = END
    return (), {"input_ids": tokens}


def two_input_ids(model: nn.Module) -> Inputs:
    """Tokens for an encoder and for a decoder."""
    generator = _generator()
    return (), {"input_ids": _tokens((2, 10), generator), "decoder_input_ids": _tokens((2, 5), generator)}


def mel_and_input_ids(model: nn.Module) -> Inputs:
    """A spectrogram for an encoder and tokens for a decoder."""
    (mel,), _ = mel_alone(model)
    return (), {"input_features": mel, "decoder_input_ids": _tokens((2, 5), _generator())}


def mel_alone(model: nn.Module) -> Inputs:
    """Two spectrograms, eight bins by twenty-four frames."""
    return (torch.randn(2, 8, 24, generator=_generator()),), {}


def vectors(*lengths: int) -> Callable[[nn.Module], Inputs]:
    """For each length two sequences of 24-vectors, with a mean that differs per position."""

    def draw(model: nn.Module) -> Inputs:
        generator = _generator()
        return tuple(
            torch.randn(2, length, 24, generator=generator) + torch.randn(2, length, 1, generator=generator)
            for length in lengths
        ), {}

    return draw


# --- builders: timm and torchvision -----------------------------------------------------------------------------------

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_classes": 7}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}


def _timm_vit(**options: Any) -> Any:
    """The class behind vit_tiny_patch16_224, DeiT-3 and DINOv2, which differ in their options."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**VIT, depth=2, num_heads=3, **options)


def _timm_deit_distilled() -> Any:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**VIT, depth=2, num_heads=3)


def _timm_beit() -> Any:
    from timm.models.beit import Beit

    return Beit(**VIT, depth=2, num_heads=3, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)


def _timm_cait() -> Any:
    from timm.models.cait import Cait

    return Cait(**VIT, depth=2, num_heads=3, init_values=1e-4, depth_token_only=2)


def _timm_mixer() -> Any:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(**VIT, num_blocks=2)


def _timm_eva(**options: Any) -> Any:
    from timm.models.eva import Eva

    return Eva(**VIT, depth=2, num_heads=3, **options)


def _timm_swin(img_size: int = 32, window_size: int = 4) -> Any:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(img_size=img_size, patch_size=4, window_size=window_size, **SWIN)


def _timm_swinv2() -> Any:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformerV2(img_size=32, patch_size=4, window_size=4, **SWIN)


def _timm_convnext() -> Any:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 12, 16, 24), num_classes=7)


def _torchvision_vit() -> Any:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=7)


def _torchvision_swin(version: int) -> Any:
    from torchvision.models import swin_transformer as swin

    parts: dict[str, Any] = {}
    if version == 2:
        parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer(patch_size=[4, 4], window_size=[4, 4], **SWIN, **parts)


def _torchvision_convnext() -> Any:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=7)


# --- builders: transformers -------------------------------------------------------------------------------------------

SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
COMMON: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
LANGUAGE: dict[str, Any] = SPECIAL | COMMON | {"max_position_embeddings": 32}
VISION: dict[str, Any] = COMMON | {"image_size": 32, "patch_size": 8}


def _transformers(name: str, attention: str = "sdpa", **options: Any) -> Any:
    """`transformers.<name>` with a small configuration.

    Without use_cache=False the graph would also return a cache. Classes that have no SDPA get "eager".
    """
    import transformers

    cls = getattr(transformers, name)
    return cls(cls.config_class(use_cache=False, attn_implementation=attention, **options))


_decoder = partial(_transformers, **LANGUAGE)
_opt = partial(_decoder, "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=24)
_rms_decoder = partial(_decoder, num_key_value_heads=1, head_dim=8)
_falcon = partial(_decoder, "FalconForCausalLM", num_attention_heads=4)
_clip_vision = partial(_transformers, **VISION, projection_dim=12)


def _gpt(name: str, attention: str, **options: Any) -> Any:
    """The models with GPT-2's names."""
    return _transformers(name, attention, **SPECIAL, n_embd=24, n_layer=2, n_head=3, n_positions=32, **options)


def _whisper() -> Any:
    return _transformers(
        "WhisperForConditionalGeneration", **SPECIAL, d_model=24, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=12, max_target_positions=16, decoder_start_token_id=START,
    )  # fmt: skip


def _whisper_encoder() -> Any:
    return _whisper().get_encoder()


def _t5() -> Any:
    return _transformers(
        "T5ForConditionalGeneration", "eager", **SPECIAL, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3,
        decoder_start_token_id=PAD,
    )  # fmt: skip


# --- builders: torch.nn -----------------------------------------------------------------------------------------------

LAYER: dict[str, Any] = {"d_model": 24, "nhead": 3, "dim_feedforward": 48, "batch_first": True}


def _torch_encoder(*, norm_first: bool, final_norm: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**LAYER, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(24) if final_norm else None, enable_nested_tensor=False)


def _torch_decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(**LAYER, norm_first=True)
    return nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(24))


def _torch_transformer(*, norm_first: bool) -> nn.Module:
    encoder = _torch_encoder(norm_first=norm_first, final_norm=True)  # its own would warn about nested tensors
    options: dict[str, Any] = {**LAYER, "num_decoder_layers": 2, "norm_first": norm_first}
    return nn.Transformer(**options, custom_encoder=encoder)


# --- the table --------------------------------------------------------------------------------------------------------

ALL = "all 2L+1: patches, tokens and positions centre, only norms read the stream"
TIED = "tied head: untie, or 1 op after the embedding sum"
RMS = "RMSNorm throughout: it sees the mean, nothing may be touched"
POST = "post-norm: each norm reads the gained output of the norm before it, whose mean no weight removes"

TIMM = (
    ZooModel("timm_vit", tiny(_timm_vit), image, 5, 5, ALL),
    ZooModel(
        "timm_vit_reg", tiny(_timm_vit, reg_tokens=2), image, 5, 5, f"{ALL}; register tokens are like the class token"
    ),
    ZooModel(
        "timm_vit_avg", tiny(_timm_vit, global_pool="avg", class_token=False), image, 5, 5,
        "all 2L+1: fc_norm reads a mean over tokens, which commutes with centring",
    ),
    ZooModel(
        "timm_vit_clip", tiny(_timm_vit, pre_norm=True), image, 6, 6,
        "all 2L+2 for 1 op: norm_pre for free; after it, because its gain gives the stream a mean",
    ),
    ZooModel(
        "timm_vit_layerscale", tiny(_timm_vit, init_values=1e-5), image, 5, 5,
        "all 2L+1: LayerScale folds into the projection, then the product centres",
    ),
    ZooModel(
        "timm_deit3", tiny(_timm_vit, init_values=1e-6, no_embed_class=True), image, 5, 5,
        f"{ALL}; positions are added before the class token is concatenated; LayerScale",
    ),
    ZooModel(
        "timm_dinov2", tiny(_timm_vit, init_values=1e-5, reg_tokens=4, no_embed_class=True), image, 5, 5,
        f"{ALL}; registers have no positions; LayerScale",
    ),
    ZooModel(
        "timm_deit_distilled", tiny(_timm_deit_distilled), image, 5, 5,
        f"{ALL}; two selected tokens go to two heads, both behind the final norm",
    ),
    ZooModel(
        "timm_beit", tiny(_timm_beit), image, 5, 5,
        f"{ALL}; LayerScale by hand, fc_norm after a mean over a slice of the tokens",
    ),
    ZooModel(
        "timm_cait", tiny(_timm_cait), image, 9, 9,
        "all 2L+2M+1: class-attention norms read class token and patches, concatenated over tokens; LayerScale",
    ),
    ZooModel(
        "timm_mixer", tiny(_timm_mixer), image, 5, 5,
        "all 2L+1 for L ops: a token-mixing branch writes with a weight over tokens, which cannot centre channels",
    ),
    ZooModel(
        "timm_eva02",
        tiny(
            _timm_eva, qkv_fused=False, mlp_ratio=8 / 3, swiglu_mlp=True, scale_mlp=True,
            use_rot_pos_emb=True, ref_feat_shape=(4, 4),
        ),
        image, 7, 5,
        "2L+1 of 3L+1: the norm inside the SwiGLU MLP reads a product of two branches",
    ),
    ZooModel(
        "timm_eva_postnorm", tiny(_timm_eva, use_post_norm=True), image, 5, 4,
        "2L of 2L+1: x + norm(branch(x)), each norm alone reads a projection; fc_norm reads the sum of gained norms",
    ),
    ZooModel(
        "timm_swin", tiny(_timm_swin), image, 11, 6,
        "patch norm, and block norms and final norm of the last stage, whose stream starts at the last reduction; an "
        "earlier stream goes to a norm over four concatenated tokens, which sees how their means differ",
    ),
    ZooModel(
        "timm_swin_padded", tiny(_timm_swin, img_size=28, window_size=3), partial(image, size=28), 11, 6,
        "as timm_swin; norm outputs are zero-padded to whole windows, and merging pads the stream",
    ),
    ZooModel(
        "timm_swinv2", tiny(_timm_swinv2), image, 11, 10,
        "all but the final norm: the others each alone read a projection (patches, branches, the merging reduction); "
        "the final one reads the sum of their gained outputs",
    ),
    ZooModel(
        "timm_convnext", tiny(_timm_convnext), image, 9, 1,
        "the stem's: block norms read a depthwise convolution, the others a stream that depthwise convolutions read",
    ),
)  # fmt: skip

TORCHVISION = (
    ZooModel("torchvision_vit", tiny(_torchvision_vit), image, 5, 5, f"{ALL}; nn.MultiheadAttention inside"),
    ZooModel("torchvision_swin", tiny(_torchvision_swin, 1), image, 11, 6, "as timm_swin; merging by slices and cat"),
    ZooModel("torchvision_swinv2", tiny(_torchvision_swin, 2), image, 11, 10, "as timm_swinv2"),
    ZooModel("torchvision_convnext", tiny(_torchvision_convnext), image, 5, 1, "as timm_convnext"),
)

TRANSFORMERS = (
    ZooModel(
        "hf_gpt2", tiny(_gpt, "GPT2LMHeadModel", "sdpa"), input_ids, 5, 5,
        f"all 2L+1; {TIED}; projections are addmm with [in, out] weights",
    ),
    ZooModel("hf_opt", tiny(_opt), input_ids, 5, 5, f"all 2L+1; {TIED}; the padding row centres too"),
    ZooModel("hf_opt_postnorm", tiny(_opt, do_layer_norm_before=False), input_ids, 4, 0, f"none (OPT-350m): {POST}"),
    ZooModel(
        "hf_bloom", tiny(_transformers, "BloomForCausalLM", "eager", **SPECIAL, hidden_size=24, n_layer=2, n_head=3),
        input_ids, 6, 5,
        "all but the embedding norm, whose table is the head's (1 op for 1 norm pays nothing); 1 op behind it",
    ),
    ZooModel(
        "hf_bloom_untied",
        tiny(
            _transformers, "BloomForCausalLM", "eager", **SPECIAL,
            hidden_size=24, n_layer=2, n_head=3, tie_word_embeddings=False,
        ),
        input_ids, 6, 6, "all 2L+2: the embedding norm's table is its own; 1 op behind it",
    ),
    ZooModel(
        "hf_gpt_neox", tiny(_decoder, "GPTNeoXForCausalLM", use_parallel_residual=True), input_ids, 5, 5,
        "all 2L+1: parallel residual, two norms on one stream value; untied head",
    ),
    ZooModel(
        "hf_gpt_neox_sequential", tiny(_decoder, "GPTNeoXForCausalLM", use_parallel_residual=False), input_ids, 5, 5,
        "all 2L+1; untied head",
    ),
    ZooModel(
        "hf_gptj", tiny(_gpt, "GPTJForCausalLM", "eager", rotary_dim=4), input_ids, 3, 3,
        "all L+1: attention and MLP share a norm; untied head with bias",
    ),
    ZooModel(
        "hf_falcon_7b", tiny(_falcon, new_decoder_architecture=False, parallel_attn=True, multi_query=True),
        input_ids, 3, 3,
        f"all L+1: one shared norm; {TIED}; projections are matmul with a transposed weight, no bias",
    ),
    ZooModel(
        "hf_falcon_40b", tiny(_falcon, new_decoder_architecture=True, num_kv_heads=2), input_ids, 5, 5,
        f"all 2L+1: ln_attn and ln_mlp on one stream value; {TIED}; matmul as in hf_falcon_7b",
    ),
    ZooModel(
        "hf_falcon_rw",
        tiny(_falcon, new_decoder_architecture=False, parallel_attn=False, multi_query=False, alibi=True, bias=True),
        input_ids, 5, 5,
        f"all 2L+1: sequential, ALiBi; {TIED}; matmul, then the bias by an add of its own",
    ),
    ZooModel(
        "hf_phi", tiny(_decoder, "PhiForCausalLM", partial_rotary_factor=0.5), input_ids, 3, 3,
        "all L+1: attention and MLP share a norm; untied head with bias",
    ),
    ZooModel(
        "hf_mpt",
        tiny(
            _transformers, "MptForCausalLM", "eager", vocab_size=VOCABULARY, d_model=24, n_layers=2, n_heads=4,
            expansion_ratio=2, max_seq_len=32, pad_token_id=PAD,
        ),
        input_ids, 5, 5,
        f"all 2L+1: norms without bias, ALiBi; {TIED}",
    ),
    ZooModel(
        "hf_olmo", tiny(_decoder, "OlmoForCausalLM"), input_ids, 5, 5,
        "all 2L+1: norms without gain and bias, cast to float32 by the model; untied head",
    ),
    ZooModel(
        "hf_whisper", tiny(_whisper), mel_and_input_ids, 12, 12,
        f"all (2L+1) + (3L+1): 1 op in the encoder, whose stream starts at a GELU; decoder: {TIED}",
    ),
    ZooModel(
        "hf_whisper_encoder", tiny(_whisper_encoder), mel_alone, 5, 5,
        "all 2L+1 for 1 op after the GELU; what is returned is behind the final norm",
    ),
    ZooModel(
        "hf_clip_text", tiny(_decoder, "CLIPTextModel"), input_ids_with_end, 5, 5,
        "all 2L+1: what is returned and pooled is behind the final norm",
    ),
    ZooModel(
        "hf_clip_text_projection", tiny(_decoder, "CLIPTextModelWithProjection", projection_dim=12),
        input_ids_with_end, 5, 5,
        "all 2L+1, as hf_clip_text",
    ),
    ZooModel(
        "hf_clip_vision", tiny(_clip_vision, "CLIPVisionModel"), pixel_values, 6, 1,
        "pre_layrnorm only: last_hidden_state is the stream itself, before post_layernorm",
    ),
    ZooModel(
        "hf_bert", tiny(_decoder, "BertForMaskedLM"), input_ids, 6, 0,
        f"not the embedding norm, whose table is the head's (1 op for 1 norm pays nothing); 2L are {POST}; the MLM "
        "head's reads a GELU",
    ),
    ZooModel(
        "hf_bert_model", tiny(_decoder, "BertModel"), input_ids, 5, 1, f"the embedding norm; 2L are {POST}",
    ),
    ZooModel(
        "hf_vit", tiny(_transformers, "ViTForImageClassification", **VISION, num_labels=7), pixel_values, 5, 5,
        f"{ALL}; only logits are returned",
    ),
    ZooModel(
        "hf_dinov2", tiny(_transformers, "Dinov2Model", **VISION, mlp_ratio=2), pixel_values, 5, 5,
        f"{ALL}; what is returned is behind the final norm; LayerScale",
    ),
    ZooModel("hf_llama", tiny(_rms_decoder, "LlamaForCausalLM"), input_ids, 0, 0, RMS),
    ZooModel("hf_qwen2", tiny(_rms_decoder, "Qwen2ForCausalLM"), input_ids, 0, 0, RMS),
    ZooModel("hf_qwen3", tiny(_rms_decoder, "Qwen3ForCausalLM"), input_ids, 0, 0, f"{RMS}; also queries and keys"),
    ZooModel("hf_gemma", tiny(_rms_decoder, "GemmaForCausalLM"), input_ids, 0, 0, f"{RMS}; stores gain - 1"),
    ZooModel(
        "hf_gemma2", tiny(_rms_decoder, "Gemma2ForCausalLM", "eager"), input_ids, 0, 0, f"{RMS}; before and after"
    ),
    ZooModel("hf_t5", tiny(_t5), two_input_ids, 0, 0, RMS),
)  # fmt: skip

TORCH = (
    ZooModel(
        "torch_encoder_prenorm", tiny(_torch_encoder, norm_first=True, final_norm=True), vectors(6), 5, 5,
        "all 2L+1 for 1 op on the input, the stream's first writer",
    ),
    ZooModel(
        "torch_encoder_bare", tiny(_torch_encoder, norm_first=True, final_norm=False), vectors(6), 4, 0,
        "none: without a final norm the stream is the output",
    ),
    ZooModel(
        "torch_encoder_postnorm", tiny(_torch_encoder, norm_first=False, final_norm=False), vectors(6), 4, 0,
        f"none: {POST}",
    ),
    ZooModel(
        "torch_decoder_prenorm", tiny(_torch_decoder), vectors(5, 6), 7, 7,
        "all 3L+1 for 1 op on the target; the memory is read raw and is another stream",
    ),
    ZooModel(
        "torch_transformer_prenorm", tiny(_torch_transformer, norm_first=True), vectors(6, 5), 12, 12,
        "all (2L+1) + (3L+1) for 2 ops, on source and target",
    ),
    ZooModel(
        "torch_transformer_postnorm", tiny(_torch_transformer, norm_first=False), vectors(6, 5), 12, 0,
        f"none: {POST}; so do the two final norms",
    ),
)  # fmt: skip

ZOO: dict[str, ZooModel] = {entry.name: entry for entry in (*TIMM, *TORCHVISION, *TRANSFORMERS, *TORCH)}
