"""Test X-Mixup, in which one block mixes attention of the target over the source into the target's states.

Logits and losses must equal the results of a plain implementation in this file (the functions ``*_by_hand``), and must
not depend on padding or on other rows.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from mixup_models import LAYER, batch, mixup_model, randomised, with_source_labels
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from two_streams import rows, task_model, tokenizer

from flare.baselines import plain_lora
from flare.baselines.mixup_layer import pair_entropy
from flare.training.collator import FlareDataCollator

# --- an implementation by hand ----------------------------------------------------------------------------------------


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(scores: Tensor, value: Tensor) -> Tensor:
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def ratio_by_hand(scores: Tensor, target: Tensor, source: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return lambda, the weight of the attention over the source, for each text, as [B, 1, 1].

    Each text is computed alone, from its attention scores without padding.
    """
    ratios = []
    for s, t, u in zip(scores, target.bool(), source.bool(), strict=True):
        unpadded = s[:, t][:, :, u]
        forth, back = unpadded.softmax(-1), unpadded.transpose(1, 2).softmax(-1)
        H = sum(-(p * p.log()).sum(-1).mean() for p in (forth, back))
        ratios.append(0.5 * torch.sigmoid(w * H + b))
    return torch.stack(ratios)[:, None, None]


def encoder_by_hand(base: Any, states: dict[str, Tensor], masks: dict[str, Tensor], norm: bool) -> dict[str, Tensor]:
    """Run the blocks of BERT or XLM-R on source and target, and return the last hidden states of both.

    Args:
        base: the model without its head. Its linear layers have LoRA.
        states: the embeddings, under "source" and "target".
        masks: the attention masks, under the same names.
        norm: whether a layer norm follows the mixture.
    """
    for index, block in enumerate(base.encoder.layer):
        attention, output = block.attention.self, block.attention.output

        def split(x: Tensor, names: str = "query key value", attention: Any = attention) -> list[Tensor]:
            return [heads(getattr(attention, name)(x), 4) for name in names.split()]

        after = {}
        for name, h in states.items():
            q, k, v = split(h)
            scores = q @ k.mT / 8**0.5
            scores = scores.masked_fill(masks[name][:, None, None] == 0, -1e300)
            after[name] = output.LayerNorm(output.dense(attend(scores, v)) + h)
        if index == LAYER:
            (q,), (k, v) = split(after["target"], "query"), split(after["source"], "key value")
            scores = q @ k.mT / 8**0.5
            mixup = attention.query.lora_x_mixup["default"]
            ratio = ratio_by_hand(
                scores, masks["target"], masks["source"], mixup.weight.squeeze(), mixup.bias.squeeze()
            )
            scores = scores.masked_fill(masks["source"][:, None, None] == 0, -1e300)
            mixed = ratio * output.dense(attend(scores, v)) + (1 - ratio) * after["target"]
            after["target"] = output.LayerNorm(mixed) if norm else mixed
        states = {
            name: block.output.LayerNorm(block.output.dense(block.intermediate(h)) + h) for name, h in after.items()
        }
    return states


def classifier_by_hand(model: Any, inputs: dict[str, Tensor], norm: bool = True) -> tuple[Tensor, Tensor]:
    """Return the target's logits and the loss. The source's cross-entropy has the weight alpha = 0.4."""
    task = model.get_base_model()
    base = task.base_model
    masks = {"source": inputs["source_attention_mask"], "target": inputs["attention_mask"]}
    states = {"source": base.embeddings(inputs["source_input_ids"]), "target": base.embeddings(inputs["input_ids"])}
    states = encoder_by_hand(base, states, masks, norm)
    pooler = getattr(base, "pooler", None)
    s, t = (task.classifier(states[n] if pooler is None else pooler(states[n])) for n in ("source", "target"))
    ps, labels = s.softmax(-1), inputs["labels"]
    loss = 0.4 * F.cross_entropy(s, labels) + 0.6 * F.cross_entropy(t, labels)
    loss = loss + (ps * (ps.log() - t.softmax(-1).log())).sum(-1).mean()
    return t, loss + ((states["source"][:, 0] - states["target"][:, 0]) ** 2).mean()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("task", ["bert", "xlmr"])
def test_logits_loss_and_gradients_equal_the_implementation_by_hand(task: str, norm: bool):
    model, inputs = mixup_model(task, layer_norm=norm), batch(task)
    assert not torch.equal(inputs["attention_mask"], inputs["source_attention_mask"])
    out = model(**inputs)
    out.loss.backward()
    grads = tiny.gradients(model)
    model.zero_grad()
    logits, loss = classifier_by_hand(model, inputs, norm)
    loss.backward()
    torch.testing.assert_close(out.logits, logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    expected = tiny.gradients(model)
    assert len([name for name in grads if "lora_x_mixup" in name]) == 2
    assert all(value.abs().max() > 1e-8 for name, value in grads.items() if "lora_" in name)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-8, atol=1e-12, msg=name)


def llama_by_hand(model: Any, inputs: dict[str, Tensor], split: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the target's logits, the loss (alpha = 0.4) and lambda of a causal model. Answers start at ``split``."""
    task = model.get_base_model()
    base, m = task.model, inputs["input_ids"].shape[1]
    causal = torch.ones(m, m).tril().bool()
    masks = {"source": inputs["source_attention_mask"], "target": inputs["attention_mask"]}
    ids = {"source": inputs["source_input_ids"], "target": inputs["input_ids"]}
    states = {name: base.embed_tokens(value) for name, value in ids.items()}
    prompts = {name: mask * (torch.arange(m) < split) for name, mask in masks.items()}
    cos, sin = base.rotary_emb(states["target"], torch.arange(m)[None])
    for index, block in enumerate(base.layers):
        attention = block.self_attn

        def project(x: Tensor, block: Any = block, attention: Any = attention) -> tuple[Tensor, Tensor, Tensor]:
            x = block.input_layernorm(x)
            q, k = heads(attention.q_proj(x), 4), heads(attention.k_proj(x), 2)
            q, k = apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))
            return q, k.repeat_interleave(2, 1), heads(attention.v_proj(x), 2).repeat_interleave(2, 1)

        after = {}
        for name, h in states.items():
            q, k, v = project(h)
            seen = causal & (masks[name][:, None, None] == 1) | torch.eye(m, dtype=torch.bool)
            after[name] = h + attention.o_proj(attend((q @ k.mT / 8**0.5).masked_fill(~seen, -1e300), v))
        if index == LAYER:
            q, (_, k, v) = project(after["target"])[0], project(after["source"])
            scores, mixup = q @ k.mT / 8**0.5, attention.q_proj.lora_x_mixup["default"]
            ratio = ratio_by_hand(scores, prompts["target"], prompts["source"], mixup.weight[0, 0], mixup.bias[0])
            scores = scores.masked_fill(prompts["source"][:, None, None] == 0, -1e300)
            after["target"] = ratio * attention.o_proj(attend(scores, v)) + (1 - ratio) * after["target"]
        states = {name: h + block.mlp(block.post_attention_layernorm(h)) for name, h in after.items()}
    hidden = {name: base.norm(h) for name, h in states.items()}
    logits = {name: task.lm_head(h) for name, h in hidden.items()}
    answers = {name: torch.where(masks[name] * (torch.arange(m) >= split) == 1, ids[name], -100) for name in ids}
    losses = {name: F.cross_entropy(logits[name][:, :-1].flatten(0, 1), answers[name][:, 1:].flatten()) for name in ids}
    means = [(hidden[n] * masks[n][..., None]).sum(1) / masks[n].sum(1, keepdim=True) for n in ("source", "target")]
    loss = 0.4 * losses["source"] + 0.6 * losses["target"] + F.mse_loss(*means)
    return logits["target"], loss, ratio.flatten()


def test_a_decoder_equals_the_implementation_by_hand_and_mixes_no_answer():
    model, inputs = mixup_model("llama"), batch("llama")
    split = int(inputs["labels"].ne(-100).int().argmax(1)[0])
    out = model(**inputs)
    logits, loss, ratio = llama_by_hand(model, inputs, split)
    assert ratio.min() > 0.01
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], logits[real], rtol=1e-5, atol=1e-6)  # RMSNorm and RoPE are in float32
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    other = {**inputs, "source_input_ids": inputs["source_input_ids"].clone()}
    other["source_input_ids"][:, split:] = 7
    torch.testing.assert_close(model(**other).logits, out.logits)
    other["source_input_ids"][:, split - 1] = 7
    assert not torch.allclose(model(**other).logits[real], out.logits[real])
    # lambda does not depend on the target's answer, so neither do the logits before the answer
    later = {**inputs, "input_ids": inputs["input_ids"].clone()}
    later["input_ids"][:, split:] = 11
    torch.testing.assert_close(model(**later).logits[:, :split], out.logits[:, :split])


def test_the_entropy_of_a_pair_ignores_padding():
    scores = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    target, source = torch.ones(2, 5).bool(), torch.ones(2, 4).bool()
    target[0, 3:], source[0, 2:], source[1, :3] = False, False, False
    p, back = scores[0, :, :3, :2].softmax(-1), scores[0, :, :3, :2].transpose(1, 2).softmax(-1)
    expected = sum(-(x * x.log()).sum(-1).mean() for x in (p, back))
    entropy = pair_entropy(scores, target, source)
    torch.testing.assert_close(entropy[0], expected)
    # The second text has one source token, so attention over the source has entropy 0. Attention of this token over the
    # five target tokens gives the whole entropy.
    back = scores[1, :, :, 3].softmax(-1)
    torch.testing.assert_close(entropy[1], -(back * back.log()).sum(-1).mean())
    entropy.sum().backward()
    assert scores.grad.isfinite().all()


# --- invariance -------------------------------------------------------------------------------------------------------


TASKS = ("bert", "xlmr", "bert-spans", "bert-tokens", "llama", "llama-classes", "mt5")


def logits_of(out: Any) -> Tensor:
    return torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else out.logits


@pytest.mark.parametrize("task", TASKS)
def test_lambda_0_is_plain_lora_and_otherwise_the_source_changes_the_logits(task: str):
    model, inputs = mixup_model(task), batch(task)
    without_mixing, plain = mixup_model(task, lambda0=0), randomised(plain_lora(task_model(task).double(), r=4))
    for other in (without_mixing, plain):
        other.load_state_dict({n: v for n, v in model.state_dict().items() if n in other.state_dict()})
    alone = {name: value for name, value in inputs.items() if not name.startswith("source_")}
    expected, actual = plain(**alone), without_mixing(**inputs)
    torch.testing.assert_close(logits_of(actual), logits_of(expected))
    assert actual.loss > 0 and abs(float(actual.loss) - float(expected.loss)) > 1e-4
    assert (logits_of(model(**inputs)) - logits_of(expected)).abs().max() > 1e-4
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(logits_of(model(**inputs)), logits_of(plain(**alone)))


@pytest.mark.parametrize("task", TASKS)
def test_padding_and_other_rows_do_not_change_the_results(task: str):
    model = mixup_model(task).eval()
    data = with_source_labels(task, rows(task, 4, 5))
    collate = FlareDataCollator(tokenizer(), layout="seq2seq" if task == "mt5" else "auto")
    many, few = collate(data), collate(data[:2])
    wide = FlareDataCollator(tokenizer(), padding="max_length", max_length=40, layout=collate.layout)(data[:2])
    outs = [model(**inputs) for inputs in (few, wide, many)]
    values = []
    for inputs, out in zip((few, wide, many), outs, strict=True):
        value = logits_of(out)[:2]
        if value.dim() > 2:  # per token
            real = inputs["labels"].ne(-100) if task == "mt5" else inputs["attention_mask"].bool()
            value = value[real[:2]]
        values.append(value)
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-5, atol=1e-5)
    if task != "bert-spans":  # the softmax of BERT's span loss includes padding positions
        torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=1e-5, atol=1e-5)


def test_the_loss_of_spans_is_the_sum_of_its_terms():
    model, inputs = mixup_model("bert-spans"), batch("bert-spans")
    assert model.peft_config["default"].x_mixup_alpha == 0.2
    out = model(**inputs)
    hidden_states: list[Tensor] = []
    base = model.get_base_model()
    handle = base.bert.encoder.register_forward_hook(lambda module, args, output: hidden_states.append(output[0]))
    model(**inputs)
    handle.remove()
    source, target = hidden_states

    def spans(hidden: Tensor, prefix: str) -> Tensor:
        start, end = base.qa_outputs(hidden).unbind(-1)
        where = inputs[f"{prefix}start_positions"], inputs[f"{prefix}end_positions"]
        return (F.cross_entropy(start, where[0]) + F.cross_entropy(end, where[1])) / 2

    masks = inputs["source_attention_mask"][..., None], inputs["attention_mask"][..., None]
    means = [(h * k).sum(1) / k.sum(1) for h, k in zip((source, target), masks, strict=True)]
    mse = F.mse_loss(*means)
    torch.testing.assert_close(out.loss, 0.2 * spans(source, "source_") + 0.8 * spans(target, "") + mse)
    # without the positions in the source, the target's loss has weight 1, and there is one warning
    bare = {name: value for name, value in inputs.items() if not name.startswith(("source_start", "source_end"))}
    with pytest.warns(UserWarning, match=r"no labels of its own \(source_start_positions"):
        loss = model(**bare).loss
    torch.testing.assert_close(loss, spans(target, "") + mse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**bare)


def test_source_spans_follow_their_tokens_with_padding_on_the_left():
    data = with_source_labels("bert-spans", rows("bert-spans", 3, 5))
    out = FlareDataCollator(tokenizer("left"))(data)
    at = torch.arange(3)
    first = out["source_input_ids"][at, out["source_start_positions"]]
    assert first.tolist() == [row["source_input_ids"][1] for row in data]
    data[0]["source_end_positions"] = 40
    with pytest.raises(ValueError, match=r"row 0: source_end_positions=40 is outside its \d+ source_input_ids"):
        FlareDataCollator(tokenizer())(data)
