"""Reading a model: every kernel, adapters, offloading, dtypes; errors that say what to do; the model left as found."""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from flashtrace_plugin import IFR, FlashTrace, Span
from flashtrace_plugin.errors import ClosureError, InputError, UnsupportedModelError
from flashtrace_plugin.models.read import layouts
from flashtrace_plugin.models.read.layouts import Layout, register_layout
from tests.reference import dense
from tests.tiny import PAD, random_ids, tiny

IDS = random_ids(24)
SPANS = {"prompt_length": 10, "target": Span(19, 24), "reasoning": Span(10, 19)}


def attributed(model, ids=IDS, method=FlashTrace):
    return method(model).attribute_ids(ids, **SPANS)


def assert_same(ours, theirs, tolerance=1e-5):
    gap = (ours.hop_scores - theirs.hop_scores).abs().max() / theirs.hop_scores.max()
    assert gap < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# Kernels, dtypes, devices
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "llama4_text", "gpt2", "deepseek_v3", "falcon", "falcon:40b"])
def test_sdpa_and_eager_give_the_same_scores(family):
    assert_same(
        attributed(tiny(family, attn_implementation="sdpa")), attributed(tiny(family, attn_implementation="eager"))
    )


def test_the_masks_of_flex_attention_are_read():
    """Its kernel is compiled, which takes minutes on a CPU; its masks, uncompiled, are what has to be read."""
    AttentionInterface.register("block_mask", _attention_on_block_mask)
    AttentionMaskInterface.register("block_mask", _block_mask)
    for family in ("llama", "mistral", "llama4_text"):
        assert_same(attributed(tiny(family, attn_implementation="block_mask")), attributed(tiny(family)))


def _block_mask(batch_size, q_length, kv_length, *, mask_function, device, **options):
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device, _compile=False)


def _attention_on_block_mask(module, q, k, v, mask, **options):
    rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    zero = torch.tensor(0)
    seen = mask.mask_mod(zero, zero, rows, keys).expand(len(rows), len(keys))
    return sdpa_attention_forward(module, q, k, v, seen[None, None], **options)


def test_falcon_alibi_kernels_compute_different_patterns_and_both_close():
    """Eager Falcon adds ALiBi twice, sdpa once; each is attributed as what it computes."""
    eager, sdpa = (attributed(tiny("falcon:alibi", attn_implementation=kernel)) for kernel in ("eager", "sdpa"))
    assert max(eager.closure_error, sdpa.closure_error) < 1e-6
    assert (eager.hop_scores - sdpa.hop_scores).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj", "cohere", "falcon:alibi", "qwen3_next"])
def test_low_precision_closes_within_its_rounding(family, dtype):
    assert_same(attributed(tiny(family, dtype=dtype)), attributed(tiny(family)), tolerance=0.1)


def test_offloaded_weights_are_fetched_through_the_module():
    model = tiny("llama")
    expected = attributed(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert offloaded.model.layers[0].self_attn.o_proj.weight.device.type == "meta"
    assert_same(attributed(offloaded), expected)


def test_device_map(tmp_path):
    tiny("qwen2").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.float32)
    assert_same(attributed(model), attributed(tiny("qwen2")))


def test_left_padding_is_refused_and_stripping_it_changes_nothing():
    model, padded = tiny("llama"), torch.cat([torch.full((5,), PAD), IDS])
    with pytest.raises(InputError, match=r"begins with 5 padding tokens \(id 1\).*attention_mask"):
        attributed(model, padded)
    mask = (padded != PAD).long()[None]
    with torch.no_grad():
        in_batch = model(padded[None], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        alone = model(padded[mask[0].bool()][None]).logits
    torch.testing.assert_close(in_batch[0, 5:], alone[0], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Anything that acts like a linear output projection
# ---------------------------------------------------------------------------------------------------------------------


def with_lora(model, **options):
    config = peft.LoraConfig(r=4, target_modules=["v_proj", "o_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_lora_on_values_and_output_is_exact(options):
    torch.manual_seed(0)
    wrapped = with_lora(tiny("llama"), **options)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    ours = attributed(wrapped)
    assert_same(ours, attributed(merged))
    assert (ours.hop_scores - attributed(tiny("llama")).hop_scores).abs().max() > 1e-2


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedModelError, match="'default' puts learned vectors before the prompt"):
        FlashTrace(peft.get_peft_model(tiny("llama"), config))


class Halves(nn.Module):
    """A linear map kept as two: what its own ``weight`` holds is not what it does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.first, self.second = (nn.Linear(*linear.weight.T.shape, bias=False) for _ in range(2))
        self.first.weight.data = linear.weight.data * 0.25
        self.second.weight.data = linear.weight.data * 0.75

    def forward(self, z):
        out = self.first(z) + self.second(z)
        return out if self.bias is None else out + self.bias


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_a_module_that_acts_like_a_linear_map(family):
    model = tiny(family)
    expected = attributed(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Halves(layer.self_attn.o_proj)
    assert_same(attributed(model), expected)


def test_tied_weights():
    model = tiny("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert attributed(model).closure_error < 1e-6


def test_a_projection_that_quantises_its_activations_is_refused():
    class Rounds(nn.Linear):
        def forward(self, z):
            return super().forward((z * 4).round() / 4)

    model = tiny("llama")
    old = model.model.layers[1].self_attn.o_proj
    new = Rounds(*old.weight.T.shape, bias=False)
    new.weight = old.weight
    model.model.layers[1].self_attn.o_proj = new
    with pytest.raises(UnsupportedModelError, match=r"llama, layer 1: .*Rounds.* not an affine map \(relative gap"):
        attributed(model)


# ---------------------------------------------------------------------------------------------------------------------
# Token-wise methods on the layouts that differ
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gptj", "gpt_oss", "qwen3_next", "mpt"])
def test_token_wise_attribution_matches_the_reference(family):
    model = tiny(family)
    theirs = dense.ifr_tokenwise(dense.read_dense(model, IDS), 10, (19, 24))
    ours = attributed(model, method=IFR)
    torch.testing.assert_close(ours.components["per_token"][:, :10].double(), theirs["columns"], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be attributed
# ---------------------------------------------------------------------------------------------------------------------


def test_a_block_that_does_not_close_is_named():
    model = tiny("qwen3")
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, out: out * 1.01)
    with pytest.raises(ClosureError, match=r"qwen3, layer 1: .*relative gap [\d.]+e-0[234], bound 1e-04"):
        attributed(model)


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        ("input_layernorm", r"cohere, layer 0: the block's output is not the stream after attention plus MLP"),
        ("mlp.up_proj", r"cohere, layer 0, 'mlp\.up_proj': its output has 48 channels"),
    ],
)
def test_a_parallel_block_that_does_not_close_is_named(table, mlp, message):
    register_layout("cohere", Layout(mid=None, mlp=mlp))
    with pytest.raises((ClosureError, UnsupportedModelError), match=message):
        attributed(tiny("cohere"))


def test_a_kernel_that_changes_when_recorded_is_refused():
    calls = []

    def drifting(module, *args, **options):
        calls.append(module)
        out, weights = sdpa_attention_forward(module, *args, **options)
        return out * (1 + 0.001 * len(calls)), weights

    AttentionInterface.register("drifting", drifting)
    AttentionMaskInterface.register("drifting", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    with pytest.raises(ClosureError, match=r"llama: LlamaForCausalLM gives other logits .*gap \d.*bound 1e-05"):
        attributed(tiny("llama", attn_implementation="drifting"))
    model = tiny("llama")
    attributed(model)
    model.set_attn_implementation("drifting")  # a model that was found right with another kernel is checked again
    with pytest.raises(ClosureError, match="gives other logits"):
        attributed(model)


@pytest.mark.parametrize("part", ["block", "self_attn", "mlp", "post_attention_layernorm"])
def test_a_module_of_two_layers_is_refused(part):
    """Its second call would be noted for both layers."""
    model = tiny("llama")
    layers = model.model.layers
    if part == "block":
        layers[2] = layers[1]
    else:
        setattr(layers[2], part, getattr(layers[1], part))
    with pytest.raises(UnsupportedModelError, match=rf"llama, layer 2 shares its '{part}' with layer 1, .*deepcopy"):
        attributed(model)
    layers[2] = copy.deepcopy(layers[1])
    assert attributed(model).closure_error < 1e-5


def test_a_recurrence_of_two_layers_is_refused():
    model = tiny("qwen3_next:hybrid")
    model.model.layers[2].linear_attn = model.model.layers[0].linear_attn
    with pytest.raises(UnsupportedModelError, match="layer 2 shares its 'linear_attn' with layer 0"):
        attributed(model)


def test_post_norm_opt_is_refused():
    with pytest.raises(UnsupportedModelError, match="do_layer_norm_before=False"):
        attributed(tiny("opt", do_layer_norm_before=False))


def test_a_mask_that_is_not_causal_is_refused():
    def both_ways(*args, **options):
        mask = ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **options)
        return torch.zeros_like(mask)

    AttentionInterface.register("both_ways", sdpa_attention_forward)
    AttentionMaskInterface.register("both_ways", both_ways)
    with pytest.raises(UnsupportedModelError, match="in both directions"):
        attributed(tiny("llama", attn_implementation="both_ways"))


# ---------------------------------------------------------------------------------------------------------------------
# Families of one's own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))


def test_unknown_family_says_what_to_do_and_can_be_registered(table):
    model = tiny("qwen3")
    expected = attributed(model)
    model.config.model_type = "mine"
    with pytest.raises(
        UnsupportedModelError, match=r"'mine' is not supported; supported are apertus.*register_layout"
    ):
        attributed(model)
    register_layout("mine", Layout())
    assert_same(attributed(model), expected)


def test_the_text_model_inside_a_multimodal_model():
    text = tiny("gemma3_text")
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=500,
        boi_token_index=501,
        eoi_token_index=502,
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    assert_same(attributed(whole), attributed(text))


def test_a_wrong_layout_is_refused(table):
    model = tiny("gemma2")
    for layout, error in (
        (Layout(), r"gemma2, layer \d: the block's output is not the stream after attention plus MLP"),
        (Layout(mid="mlp"), r"gemma2, layer \d: the block's output is not"),
        (Layout(mlp="post_feedforward_layernorm"), r"gemma2, layer \d: the block's output is not"),
        (
            Layout(mid="pre_feedforward_layernorm", mlp="post_feedforward_layernorm"),
            r"gemma2, layer \d: attention's parts do not add up",
        ),
        (Layout(blocks="decoder.layers"), "Gemma2ForCausalLM has no 'decoder.layers'"),
        (Layout(mid="norm_2"), "layer 0 has no 'norm_2', only self_attn"),
    ):
        register_layout("gemma2", layout)
        with pytest.raises((ClosureError, UnsupportedModelError), match=error):
            attributed(model)


# ---------------------------------------------------------------------------------------------------------------------
# The model is left as it was found
# ---------------------------------------------------------------------------------------------------------------------


def state(model) -> dict:
    """What a visitor could leave behind."""
    return {
        name: (
            set(vars(module)),
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            type(module),
        )
        for name, module in model.named_modules()
    } | {
        "kernel": model.config._attn_implementation,
        "grad": [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()],
    }


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt_neo", "bloom", "mpt", "falcon", "codegen", "gemma2", "phi"])
def test_the_model_is_left_as_it_was_found(family):
    model = tiny(family).train(family != "llama")
    before = state(model)
    attributed(model)
    assert state(model) == before


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom", "mpt", "falcon"])
def test_the_model_is_left_as_it_was_found_after_an_error(family):
    model = tiny(family)
    before = state(model)

    def fails(module, args):
        raise RuntimeError("out of memory")

    handle = model.get_output_embeddings().register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        attributed(model)
    handle.remove()
    assert state(model) == before
