"""A layout that does not fit its model is refused with what it names and what is there instead."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import transformers

from flashtrace_plugin import HETA, LRP, ClosureError, FlashTrace, FlashTraceError, Span, UnsupportedModelError
from flashtrace_plugin.methods.registry import METHODS
from flashtrace_plugin.models.read import layouts, own_attention
from flashtrace_plugin.models.read.layouts import Layout, layout_for, register_layout
from tests.tiny import config_of, random_ids, tiny

IDS = random_ids(16)
SPANS = {"prompt_length": 6, "target": Span(12, 15), "reasoning": Span(8, 10)}

NOT_THERE = [
    (
        "blocks",
        "model.blocks",
        "has no 'model.blocks', where family 'llama' keeps its blocks; its LlamaModel has embed_tokens",
    ),
    ("blocks", "decoder.layers", "has no 'decoder.layers', .* LlamaForCausalLM has model, lm_head"),
    ("attn", "attention", "has no 'attention', only self_attn, mlp, input_layernorm"),
    ("W_O", "self_attn.out", "has no 'self_attn.out', only"),
    ("mid", "ln_2", "has no 'ln_2', only"),
    ("mlp", "ffn", "has no 'ffn', only"),
    ("post_norm", "post_norm", "has no 'post_norm', only"),
    ("gate", "self_attn.gate", "has no 'self_attn.gate', only"),
    ("multiplier", "residual_multiplier", "'residual_multiplier' .*is no number.*: NoneType"),
    ("out_scale", "layer_scalar", "'layer_scalar' .*is no number.*: NoneType"),
]
OTHER_THINGS = [
    ("blocks", "model", "'model' .* is a LlamaModel, not a list of blocks"),
    ("blocks", "model.norm", "'model.norm' .* is a LlamaRMSNorm, not a list of blocks"),
    ("blocks", "model.layers.0", "is a LlamaDecoderLayer, not a list of blocks"),
    ("blocks", "", "is a LlamaForCausalLM, not a list of blocks"),
    ("attn", "mlp", "LlamaMLP does not hand its queries and keys"),
    ("attn", "", "LlamaDecoderLayer does not hand its queries and keys"),
    ("W_O", "self_attn.v_proj", r"'self_attn.v_proj' maps 4 heads of 8 channels to 16, .*4 heads of 8 channels .* 32"),
    ("W_O", "mlp.down_proj", "'mlp.down_proj' maps 4 heads of 12 channels to 32"),
    ("W_O", "self_attn", "LlamaAttention, the output projection, cannot be applied to what heads have read"),
    ("W_O", "", "LlamaDecoderLayer, the output projection, cannot be applied"),
    ("W_O", "mlp", "is not an affine map"),
    ("mid", "mlp.down_proj", "'mlp.down_proj'.* 48 channels, where the stream need"),
    ("mid", "mlp.act_fn", "'mlp.act_fn'.* 48 channels"),
    ("mlp", "mlp.up_proj", "'mlp.up_proj'.* 48 channels"),
    ("post_norm", "mlp.act_fn", "'mlp.act_fn', a SiLUActivation, has no gain"),
    ("post_norm", "self_attn", "'self_attn', a LlamaAttention, has no gain"),
    ("post_norm", "mlp.down_proj", "'mlp.down_proj', a Linear, has no gain"),
    ("multiplier", "mlp", "'mlp' .*is no number.*: LlamaMLP"),
    ("gate", "self_attn.q_proj", "'self_attn.q_proj'.* 32 channels, where .* 64"),
    ("gate", "mlp.gate_proj", "'mlp.gate_proj'.* 48 channels, where .* 64"),
    ("reader", own_attention.bloom, "LlamaAttention is not what its layout's reader reads: .*_reshape"),
    ("reader", own_attention.inner_attn, "is not what its layout's reader reads: .*_attn"),
    ("reader", own_attention.mpt, "is not what its layout's reader reads: .*Wqkv"),
    ("reader", own_attention.falcon, "is not what its layout's reader reads: .*_split_heads"),
]
NOT_CLOSING = [
    ("W_O", "self_attn.q_proj"),
    ("mid", "input_layernorm"),
    ("mid", "self_attn"),
    ("mlp", "self_attn"),
    ("post_norm", "post_attention_layernorm"),
]


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))


@pytest.mark.parametrize(("part", "value", "message"), NOT_THERE + OTHER_THINGS)
def test_a_wrong_part_is_named(part, value, message):
    register_layout("llama", replace(Layout(), **{part: value}))
    with pytest.raises(UnsupportedModelError, match=message):
        FlashTrace(tiny("llama")).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize(("part", "value"), NOT_CLOSING)
def test_parts_that_are_there_but_are_others_do_not_close(part, value):
    register_layout("llama", replace(Layout(), **{part: value}))
    with pytest.raises(ClosureError):
        FlashTrace(tiny("llama")).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("blocks", "transformer.wte", "'transformer.wte' .* is a Embedding, not a list"),
        ("W_O", "attn.c_attn", "'attn.c_attn' maps 4 heads of 8 channels to 96"),
        ("W_O", "mlp.c_fc", "'mlp.c_fc' maps 4 heads of 8 channels to 48"),
        ("mid", "mlp.c_proj", "'mlp.c_proj'.* 48 channels"),
        ("post_norm", "attn.resid_dropout", "has no gain"),
    ],
)
def test_a_wrong_part_of_gpt2_is_named(part, value, message):
    right = Layout(blocks="transformer.h", attn="attn", W_O="attn.c_proj", mid="ln_2")
    register_layout("gpt2", right)
    FlashTrace(tiny("gpt2")).attribute_ids(IDS, **SPANS)
    register_layout("gpt2", replace(right, **{part: value}))
    with pytest.raises(UnsupportedModelError, match=message):
        FlashTrace(tiny("gpt2")).attribute_ids(IDS, **SPANS)


def test_a_projection_that_cannot_be_cut_into_heads():
    model = tiny("gpt2", n_inner=50)
    register_layout("gpt2", Layout("transformer.h", "attn", "mlp.c_proj", "ln_2"))
    with pytest.raises(UnsupportedModelError, match="takes 50 channels, which cannot be cut into 4 heads"):
        FlashTrace(model).attribute_ids(IDS, **SPANS)


def test_other_methods_name_wrong_blocks_too():
    register_layout("llama", Layout(blocks="model.norm"))
    with pytest.raises(UnsupportedModelError, match="not a list of blocks"):
        HETA(tiny("llama"), gate=None, last_layers=1).attribute_ids(IDS, **SPANS)
    model = tiny("llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)  # no ModuleList, so the layout is asked
    with pytest.raises(UnsupportedModelError, match="not a list of blocks"):
        LRP(model).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize("layout", ["llama", None, {"blocks": "model.layers"}])
def test_what_is_no_layout(layout):
    with pytest.raises(UnsupportedModelError, match=r"must be a Layout\(\.\.\.\) or a function of the configuration"):
        register_layout("llama", layout)
    register_layout("llama", lambda config: layout)
    with pytest.raises(UnsupportedModelError, match=r"must be a Layout\(\.\.\.\)"):
        FlashTrace(tiny("llama")).attribute_ids(IDS, **SPANS)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def blip2(family):
    former = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=former | {"vocab_size": 50, "encoder_hidden_size": 16},
        text_config=config_of(family).to_dict(),
    )
    return transformers.Blip2ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_wrapper_that_needs_an_image(family, method):
    model = blip2(family)
    with pytest.raises(UnsupportedModelError, match=r"cannot be run on tokens alone: it needs pixel_values"):
        method(model)
    if family == "llama":
        method(model.language_model).attribute_ids(IDS, **SPANS)


def test_the_layout_of_a_wrapper_is_that_of_its_text_model():
    assert layout_for(blip2("opt").config) == layout_for(config_of("opt"))
    config = blip2("opt").config
    config.text_config.do_layer_norm_before = False
    with pytest.raises(UnsupportedModelError, match="opt-350m"):
        layout_for(config)


def test_a_wrapper_of_several_text_models():
    with pytest.raises(UnsupportedModelError, match="'musicgen' is not supported"):
        layout_for(transformers.AutoConfig.for_model("musicgen"))


def test_a_model_without_one_table_of_tokens():
    config = transformers.MusicgenDecoderConfig(
        vocab_size=512, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, num_codebooks=2
    )
    with pytest.raises(UnsupportedModelError, match="has no table of token embeddings"):
        FlashTrace(transformers.MusicgenForCausalLM(config))


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_that_names_no_padding(name):
    model = tiny("codegen")
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        vars(model.config).pop(token, None)
    expected = METHODS[name](tiny("codegen")).attribute_ids(IDS, **SPANS)
    torch.testing.assert_close(METHODS[name](model).attribute_ids(IDS, **SPANS).scores, expected.scores)


def test_heta_without_a_padding_token_says_so():
    model = tiny("codegen")
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        vars(model.config).pop(token, None)
    with pytest.raises(FlashTraceError, match="mask='pad' needs a token"):
        HETA(model, mask="pad")


def test_every_causal_family_gets_as_far_as_the_table_of_layouts():
    """With the configuration that the family has by default; whether it is in the table is all that may be refused."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from flashtrace_plugin.models.guard import check_ids

    class Model:
        def __init__(self, config):
            self.config, self.table = config, torch.nn.Embedding(1000, 2)

        def get_input_embeddings(self):
            return self.table

    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {"gemma4_assistant"}:  # its defaults are refused
        config = transformers.AutoConfig.for_model(family)
        if config.is_encoder_decoder:
            continue
        check_ids(Model(config), torch.arange(900, 909))
        try:
            layout_for(config)
        except UnsupportedModelError as error:
            told = str(error)
            assert (f"{config.model_type!r}" in told and "is not supported" in told) or "opt-350m" in told


def test_a_block_that_scales_its_stream_does_not_close_without_saying_so():
    register_layout("gemma4_text", replace(layout_for(config_of("gemma4_text")), out_scale=None))
    with pytest.raises(ClosureError, match="the block's output is not the stream after attention plus MLP"):
        FlashTrace(tiny("gemma4_text")).attribute_ids(IDS, **SPANS)


SPARSE = {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"], "index_n_heads": 2}


@pytest.mark.parametrize("blocks", [16, 2])
def test_attention_that_chooses_its_keys_is_refused(blocks):
    """Also where the first text is so short that everything is chosen, and logits and closure are right."""
    model = tiny("minimax_m3_vl_text", **SPARSE, index_block_size=4, index_topk_blocks=blocks)
    with pytest.raises(UnsupportedModelError, match="layer 1 has sparse attention: its MiniMaxM3VLIndexer chooses"):
        FlashTrace(model).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize(
    ("family", "first"),
    [
        ("qwen3", "llama: Layout()"),
        ("cohere2", "cohere: Layout(mid=None)"),
        ("gemma3_text", "gemma2: Layout(mid='pre_feedforward_layernorm', mlp='post_feedforward_layernorm', post_norm"),
        ("olmo3", "exaone4: Layout(mid='mlp', mlp='post_feedforward_layernorm', post_norm="),
        ("granitemoe_swa", "granitemoeshared: Layout(mlp=('block_sparse_moe', 'shared_mlp'), multiplier="),
        ("qwen3_next", "qwen3_5_moe_text: Layout(gate='self_attn.q_proj')"),
        (
            "qwen3_next:hybrid",
            "qwen3_5_moe_text: Layout(gate='self_attn.q_proj', others=(Layout(attn='linear_attn', "
            "W_O='linear_attn.out_proj', reader=recurrence.DELTA_RULE),))",
        ),
        ("gpt2", "gpt2: Layout(blocks='transformer.h', attn='attn', W_O='attn.c_proj', mid='ln_2')"),
        ("fuyu", "persimmon: Layout(blocks='model.language_model.layers', W_O='self_attn.dense')"),
    ],
)
def test_an_unknown_family_is_told_whose_layouts_fit(family, first):
    model = tiny(family)
    for config in (model.config, model.config.get_text_config()):
        config.model_type = "mine"
    with pytest.raises(UnsupportedModelError, match=rf"parts of {re.escape(first)}.*register_layout\('mine', "):
        FlashTrace(model).attribute_ids(IDS, **SPANS)


def test_no_layout_is_offered_that_does_not_fit_every_layer():
    model = tiny("qwen3_next")
    del model.model.layers[1].self_attn
    model.config.model_type = "mine"
    with pytest.raises(UnsupportedModelError, match="If its block is built like one of these"):
        FlashTrace(model).attribute_ids(IDS, **SPANS)


def test_attention_that_hands_over_by_name_is_read():
    """Its gates are not in the layout, which is what does not close then."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = transformers.AfmoeConfig(**sizes, **experts, head_dim=8, num_hidden_layers=2, vocab_size=512)
    norms = {"post_norm": "post_attention_layernorm", "mid": "pre_mlp_layernorm", "mlp": "post_mlp_layernorm"}
    register_layout("afmoe", Layout(**norms))
    with pytest.raises(ClosureError, match="attention's parts do not add up"):
        FlashTrace(transformers.AutoModelForCausalLM.from_config(config).eval()).attribute_ids(IDS, **SPANS)
