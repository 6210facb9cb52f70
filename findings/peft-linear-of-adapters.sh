#!/usr/bin/env bash
# peft 0.21.2: `add_weighted_adapter(..., combination_type="linear")` does not add up what adapters do.
#
# Guess, written before the run: the change of the combined adapter is 0.5 * (first) + 0.5 * (second), up
# to rounding.
# Seen: it is off by as much as that sum is long (relative error 0.99 of random adapters of rank 4): the
# factors A and B are averaged, each by the square root of its weight, so that their product has the cross
# terms B1 A2 and B2 A1. "svd" keeps the largest rank of its inputs, and is off by 0.56; "cat" is exact.
# Whom it concerns: who merges adapters, and compares with merges of full models.
# What Suture does: a recipe that names adapters merges their changes (docs/adapters.md).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 "$place/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
))
how = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
model = get_peft_model(model, how, adapter_name="first")
model.add_adapter("second", how)
layer = model.base_model.model.model.layers[0].self_attn.q_proj
wanted = 0.5 * layer.get_delta_weight("first") + 0.5 * layer.get_delta_weight("second")
errors = {}
for kind in ("linear", "svd", "cat"):
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], kind, combination_type=kind)
    errors[kind] = ((layer.get_delta_weight(kind) - wanted).norm() / wanted.norm()).item()
print({kind: round(error, 3) for kind, error in errors.items()})
assert errors["linear"] > 0.5
assert errors["svd"] > 0.1
assert errors["cat"] < 1e-5
PY
