"""What people bring: models of transformers, timm and torchvision, tiny, saved as each package or a training saves them.

Every row says what a pass makes of the model: how many of its norms are rewritten, and why others are not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.zoo import torchvision_shim
from tests.zoo.models import (
    LANGUAGE,
    PAD,
    SPECIAL,
    START,
    VISION,
    Inputs,
    image,
    input_ids,
    input_ids_with_end,
    mel_and_input_ids,
    pixel_values,
    tiny,
    two_input_ids,
)

torchvision_shim.install()


@dataclass(frozen=True)
class Brought:
    """A model on disk, and what comes back of it.

    Attributes:
        package: whose class it is.
        model: the name of the class or of the architecture.
        settings: what it is built with.
        form: ``folder``, or what a file is called.
        passes: the pass, or all.
        norms: how many of its norms are rewritten.
        stay: why the others are not, as codes.
        quick: whether it is tested in every run.
    """

    package: str
    model: str
    settings: dict[str, Any]
    form: str
    passes: str
    norms: int
    stay: str = ""
    quick: bool = False

    def build(self) -> nn.Module:
        """The model, whose weights hide nothing."""
        return tiny(_made, self)()

    @property
    def is_folder(self) -> bool:
        return self.form == "folder"

    @property
    def flags(self) -> list[str]:
        """What the command has to be told beside the file."""
        if self.is_folder:
            return []
        return ["--model", ",".join([f"{self.package}:{self.model}", *(f"{k}={v!r}" for k, v in self.settings.items())])]

    @property
    def opened(self) -> dict[str, Any]:
        """How its own package opens it."""
        settings = {} if self.package == "transformers" else self.settings
        return {"package": self.package, "name": self.model, "settings": settings}

    @property
    def says(self) -> bool:
        """Whether it generates tokens."""
        return any(sign in self.model for sign in ("CausalLM", "LMHead", "ConditionalGeneration", "MarianMT"))

    def inputs(self, model: nn.Module) -> Inputs:
        """What it is compared on: other inputs, and of other sizes, than those that are found on it."""
        if self.package != "transformers":
            return image(model, self.settings.get("img_size") or 64)
        taken = next(takes for sign, takes in _TAKES.items() if sign in self.model)
        return taken(model)

    def save(self, model: Any, path: Path) -> None:
        """As its package saves it, or a training."""
        if self.package == "transformers":
            model.save_pretrained(path, max_shard_size="20KB")
            (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
        elif self.is_folder:
            import timm

            timm.models.save_for_hf(model, str(path), model_args=self.settings, safe_serialization=True)
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(model.state_dict(), path, metadata={"format": "pt"})
        elif path.suffix == ".ckpt":
            state = {f"module.{key}": value for key, value in model.state_dict().items()}
            torch.save({"epoch": 3, "state_dict": state}, path)
        else:
            torch.save(model.state_dict(), path)


def _made(brought: Brought) -> Any:
    if brought.package == "timm":
        import timm

        return timm.create_model(brought.model, **brought.settings)
    if brought.package == "torchvision":
        import torchvision

        return torchvision.models.get_model(brought.model, **brought.settings)
    import transformers

    cls = getattr(transformers, brought.model)
    return cls(cls.config_class(**brought.settings))


def _text_and_picture(model: nn.Module) -> Inputs:
    return (), input_ids_with_end(model)[1] | pixel_values(model)[1]


_TAKES = {
    "ForImageClassification": pixel_values, "VisionModel": pixel_values, "CLIPModel": _text_and_picture,
    "Whisper": mel_and_input_ids, "ConditionalGeneration": two_input_ids, "MarianMT": two_input_ids, "": input_ids,
}  # fmt: skip

# -- transformers ------------------------------------------------------------------------------------------------------

TEXT = LANGUAGE | {"max_position_embeddings": 64}
GPT = SPECIAL | {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
FALCON = TEXT | {"num_attention_heads": 4}
ONE_NORM = FALCON | {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True}
TWO_NORMS = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
SEQUENTIAL = FALCON | {
    "new_decoder_architecture": False, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True,
}  # fmt: skip
BLOOM = SPECIAL | {"hidden_size": 24, "n_layer": 2, "n_head": 3}
BLOOM_POST = BLOOM | {"apply_residual_connection_post_layernorm": True}
GPT_NEO = SPECIAL | {
    "hidden_size": 24, "num_layers": 2, "num_heads": 3, "max_position_embeddings": 64, "window_size": 8,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
XGLM = SPECIAL | {"d_model": 24, "ffn_dim": 48, "num_layers": 2, "attention_heads": 3, "max_position_embeddings": 64}
BARE = TEXT | {"num_key_value_heads": 1, "tie_word_embeddings": False, "use_bias": False}
QK_NORM = TEXT | {"num_key_value_heads": 1, "use_qk_norm": True, "logit_scale": 0.25}
OPT = TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 24}
POST_NORM = OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
PICTURE = VISION | {"num_labels": 7}
SWIGLU = PICTURE | {"mlp_ratio": 2, "use_swiglu_ffn": True}
PAIR = SPECIAL | {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": START,
}  # fmt: skip
WHISPER = PAIR | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 20}
T5 = SPECIAL | {"d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": PAD}
MPT = {
    "vocab_size": 99, "d_model": 24, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONVNEXT = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32, "num_labels": 7}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def _folder(model: str, settings: dict[str, Any], passes: str, norms: int, stay: str = "", **more: Any) -> Brought:
    return Brought("transformers", model, settings, "folder", passes, norms, stay, **more)


LAYER_NORM = {
    "gpt2": _folder("GPT2LMHeadModel", GPT, "all", 5, quick=True),
    "bert": _folder("BertForSequenceClassification", TEXT, "all", 2, "NF205 NF311 NF501 NF503"),
    "bert_mlm": _folder("BertForMaskedLM", TEXT, "all", 1, "NF202 NF205 NF206 NF311 NF501 NF503"),
    "roberta": _folder("RobertaForQuestionAnswering", TEXT, "pre_rmsnorm", 1, "NF205"),
    "opt": _folder("OPTForCausalLM", OPT, "pre_rmsnorm", 5),
    "opt_350m": _folder("OPTForCausalLM", POST_NORM, "all", 1, "NF201 NF205 NF311 NF501 NF503"),
    "opt_projected": _folder("OPTForCausalLM", OPT | {"word_embed_proj_dim": 16}, "all", 5, "NF503"),
    "opt_no_final": _folder("OPTForCausalLM", OPT | {"_remove_final_layer_norm": True}, "all", 4, "NF503"),
    "gpt_neox": _folder("GPTNeoXForCausalLM", TEXT, "all", 5),
    "gpt_neox_folded": _folder("GPTNeoXForCausalLM", TEXT, "fold_affine", 5, ""),
    "gpt_neox_sequential": _folder("GPTNeoXForCausalLM", TEXT | {"use_parallel_residual": False}, "all", 5),
    "gpt_neox_tied": _folder("GPTNeoXForCausalLM", TEXT | {"tie_word_embeddings": True}, "all", 5),
    "gptj": _folder("GPTJForCausalLM", GPT | {"rotary_dim": 4}, "all", 3),
    "gptj_tied": _folder("GPTJForCausalLM", GPT | {"rotary_dim": 4, "tie_word_embeddings": True}, "all", 3),
    "gpt_neo": _folder("GPTNeoForCausalLM", GPT_NEO, "all", 5),
    "gpt_bigcode": _folder("GPTBigCodeForCausalLM", GPT, "all", 5),
    "codegen": _folder("CodeGenForCausalLM", GPT | {"rotary_dim": 4, "n_head": 4}, "all", 3),
    "xglm": _folder("XGLMForCausalLM", XGLM, "all", 5),
    "bloom": _folder("BloomForCausalLM", BLOOM, "pre_rmsnorm", 5, "NF206"),
    "bloom_post_norm": _folder("BloomForCausalLM", BLOOM_POST, "all", 0, "NF205 NF206 NF311 NF501"),
    "falcon_one_norm": _folder("FalconForCausalLM", ONE_NORM, "pre_rmsnorm", 3),
    "falcon_two_norms": _folder("FalconForCausalLM", TWO_NORMS, "pre_rmsnorm", 5),
    "falcon_two_norms_folded": _folder("FalconForCausalLM", TWO_NORMS, "all", 5),
    "falcon_new_one_norm": _folder("FalconForCausalLM", TWO_NORMS | {"num_ln_in_parallel_attn": 1}, "all", 3),
    "falcon_sequential": _folder("FalconForCausalLM", SEQUENTIAL, "all", 5),
    "mpt": _folder("MptForCausalLM", MPT, "pre_rmsnorm", 5),
    "mpt_clipped": _folder("MptForCausalLM", MPT | {"attn_config": {"clip_qkv": 3.0, "alibi": True}}, "all", 5),
    "starcoder2": _folder("Starcoder2ForCausalLM", TEXT | {"num_key_value_heads": 1}, "pre_rmsnorm", 5),
    "starcoder2_bare": _folder("Starcoder2ForCausalLM", BARE, "all", 5),
    "phi": _folder("PhiForCausalLM", TEXT | {"partial_rotary_factor": 0.5}, "all", 3, "NF503"),
    "stablelm": _folder("StableLmForCausalLM", TEXT | {"num_key_value_heads": 3}, "pre_rmsnorm", 5),
    "nemotron": _folder("NemotronForCausalLM", TEXT | {"num_key_value_heads": 1}, "pre_rmsnorm", 5),
    "nemotron_tied": _folder("NemotronForCausalLM", TEXT | {"num_key_value_heads": 1, "tie_word_embeddings": True}, "all", 5),
    "cohere": _folder("CohereForCausalLM", TEXT | {"num_key_value_heads": 1}, "all", 3),
    "cohere_qk_norm": _folder("CohereForCausalLM", QK_NORM, "all", 5, "NF204 NF311"),
    "cohere2": _folder("Cohere2ForCausalLM", TEXT | {"num_key_value_heads": 1, "sliding_window": 8}, "all", 3),
    "phimoe": _folder("PhimoeForCausalLM", GROUPED | EXPERTS, "all", 5),
    "olmo": _folder("OlmoForCausalLM", TEXT, "pre_rmsnorm", 5),
    "vit": _folder("ViTForImageClassification", PICTURE, "all", 5),
    "deit": _folder("DeiTForImageClassification", PICTURE, "pre_rmsnorm", 5),
    "beit": _folder("BeitForImageClassification", PICTURE, "pre_rmsnorm", 5),
    "dinov2": _folder("Dinov2ForImageClassification", PICTURE | {"mlp_ratio": 2}, "pre_rmsnorm", 5),
    "dinov2_split": _folder("Dinov2ForImageClassification", SWIGLU, "all", 5),
    "dinov2_split_folded": _folder("Dinov2ForImageClassification", SWIGLU, "fold_affine", 3, "NF104"),
    "clip": _folder(
        "CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 12}, "pre_rmsnorm", 6, "NF201"
    ),
    "convnext": _folder("ConvNextForImageClassification", CONVNEXT, "pre_rmsnorm", 1, "NF201 NF202 NF205"),
    "swin": _folder("SwinForImageClassification", SWIN, "pre_rmsnorm", 6, "NF201 NF204"),
    "whisper": _folder("WhisperForConditionalGeneration", WHISPER, "all", 12),
    "bart": _folder("BartForConditionalGeneration", PAIR, "all", 0, "NF205 NF206 NF311 NF501 NF503"),
    "mbart": _folder("MBartForConditionalGeneration", PAIR, "pre_rmsnorm", 12, "NF206"),
    "marian": _folder("MarianMTModel", PAIR, "all", 0, "NF201 NF205 NF311 NF501 NF503"),
}

RMS_NORM = {
    "llama": _folder("LlamaForCausalLM", GROUPED, "fold_affine", 5, quick=True),
    "llama_tied": _folder("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, "fold_affine", 4, "NF501"),
    "mistral": _folder("MistralForCausalLM", GROUPED, "fold_affine", 5),
    "qwen2": _folder("Qwen2ForCausalLM", GROUPED, "fold_affine", 5, "NF503"),
    "qwen3": _folder("Qwen3ForCausalLM", GROUPED, "fold_affine", 5, "NF501"),
    "gemma": _folder("GemmaForCausalLM", GROUPED, "fold_affine", 4, "NF501"),
    "gemma2": _folder("Gemma2ForCausalLM", GROUPED | {"query_pre_attn_scalar": 8}, "fold_affine", 4, "NF501"),
    "t5": _folder("T5ForConditionalGeneration", T5, "fold_affine", 10, "NF501"),
    "olmo2": _folder("Olmo2ForCausalLM", GROUPED, "fold_affine", 1, "NF501"),
    "phi3": _folder("Phi3ForCausalLM", GROUPED, "fold_affine", 5),
    "mixtral": _folder("MixtralForCausalLM", GROUPED | EXPERTS, "fold_affine", 3, "NF501"),
    "granite": _folder("GraniteForCausalLM", GROUPED, "fold_affine", 5),
}

# -- timm and torchvision ----------------------------------------------------------------------------------------------

SQUARES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}
WINDOWS = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}

TIMM = {
    "timm_vit": Brought("timm", "vit_tiny_patch16_224", SQUARES, "folder", "all", 5, quick=True),
    "timm_deit": Brought("timm", "deit_tiny_distilled_patch16_224", SQUARES, "m.safetensors", "pre_rmsnorm", 5),
    "timm_beit": Brought("timm", "beit_base_patch16_224", SQUARES, "m.pth", "pre_rmsnorm", 5),
    "timm_swin": Brought("timm", "swin_tiny_patch4_window7_224", WINDOWS, "m.safetensors", "pre_rmsnorm", 6, "NF201 NF204"),
    "timm_eva": Brought("timm", "eva02_tiny_patch14_224", SQUARES, "m.ckpt", "pre_rmsnorm", 5),
    "timm_convnext": Brought("timm", "convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}, "m.pth", "all", 9),
    "timm_resnet": Brought("timm", "resnet10t", {"num_classes": 7}, "m.ckpt", "conv_bn", 14),
    "timm_efficientnet": Brought("timm", "test_efficientnet", {"num_classes": 7}, "folder", "conv_bn", 13),
    "timm_mobilenetv3": Brought("timm", "mobilenetv3_small_050", {}, "m.safetensors", "conv_bn", 34),
    "timm_regnet": Brought("timm", "regnety_002", {}, "m.pth", "all", 44),
}

TORCHVISION = {
    "resnet18": Brought("torchvision", "resnet18", {"num_classes": 7}, "m.pth", "conv_bn", 20),
    "mobilenet_v2": Brought("torchvision", "mobilenet_v2", {"width_mult": 0.25}, "m.safetensors", "all", 52),
    "mobilenet_v3": Brought("torchvision", "mobilenet_v3_small", {}, "m.ckpt", "conv_bn", 34),
    "shufflenet": Brought("torchvision", "shufflenet_v2_x0_5", {}, "m.pth", "conv_bn", 56),
    "efficientnet": Brought("torchvision", "efficientnet_b0", {}, "m.pth", "conv_bn", 49),
    "swin_t": Brought("torchvision", "swin_t", {}, "m.safetensors", "pre_rmsnorm", 6, "NF201 NF204"),
}

ALL = LAYER_NORM | RMS_NORM | TIMM | TORCHVISION
